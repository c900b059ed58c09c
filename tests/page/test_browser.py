"""The page in a real browser; skipped with its reason where there is none.

Screenshots of every page go to `screenshots/`, for a person to look at. All stay with GPT-2 and micro-batches above 1,
so that the server builds the accounts of few recipes.
"""

import json
import os
from random import Random

import pytest

pytest.importorskip("streamlit", reason="the page needs the app extra: pip install -e '.[app]'")
from page_browser import PAGES, drawn, metric, metric_becomes, select, shoot, violations, visitor

import estimator as est
from app_pages import scenarios
from estimator.show.formatting import hours, size

RUN = {name: scenarios.DEFAULTS[name] for name in ("steps", "global_batch_size")}  # the sidebar's


def test_each_page_opens_and_keeps_what_was_set(address, browser):
    with visitor(browser, f"{address}/?batch_size=8") as page:
        for name in PAGES:
            path = f"/{name.lower()}" if name != "Estimate" else "/"
            page.get_by_test_id("stTopNavLink").filter(has_text=name).click()
            page.wait_for_function("path => location.pathname === path", arg=path)
            drawn(page)
            assert "batch_size=8" in page.url
            assert page.get_by_label("Micro-batch", exact=True).first.input_value() == "8"
            assert (name, violations(page)) == (name, [])
            shoot(page, name.lower())


def test_each_link_opens_on_a_phone_in_the_dark(address, browser):
    with visitor(browser, f"{address}/?batch_size=8", width=390, height=844, dark=True) as page:
        for name in PAGES:
            page.goto(f"{address}/{name.lower() if name != 'Estimate' else ''}?model=gpt2&batch_size=8")
            drawn(page)
            scroll, width = page.evaluate(
                "[Math.max(...[document.documentElement, document.querySelector('[data-testid=stMain]')]"
                ".map(e => e.scrollWidth)), innerWidth]"
            )
            assert (name, scroll) == (name, width)
            colour = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
            assert colour == "rgb(20, 23, 28)"
            # A long formula is scrolled sideways; Chromium lets the keyboard do it, which axe does not know.
            assert (name, violations(page, without=["scrollable-region-focusable"])) == (name, [])
            shoot(page, f"{name.lower()}-phone-dark")


def test_changes_of_model_recipe_and_accelerator_reach_the_figures_and_the_link(address, browser):
    with visitor(browser, f"{address}/?batch_size=8") as page:
        assert metric(page, "Memory needed") == "102 GiB"
        select(page, "Preset, or your own", "gpt2-medium")
        page.get_by_role("heading", name="gpt2-medium on A100").wait_for()
        select(page, "Attention", "sdpa")
        page.wait_for_function("location.search.includes('attention=sdpa')")
        select(page, "Accelerator", "h100-80gb-sxm")
        page.get_by_role("heading", name="gpt2-medium on H100").wait_for()
        drawn(page)
        batch = page.get_by_label("Micro-batch", exact=True).first
        batch.focus()
        page.keyboard.press("ArrowUp")  # the keyboard is enough
        page.keyboard.press("Enter")
        r = est.estimate("gpt2-medium", est.Plan(batch_size=9, attention="sdpa"), "h100-80gb-sxm", **RUN)
        metric_becomes(page, "Memory needed", size(r.memory.needed))
        drawn(page)
        link, shown = page.url, [metric(page, name) for name in ("Memory needed", "Training time", "Cost")]
        assert shown[:2] == [size(r.memory.needed), hours(r.time.seconds)]
        assert "batch_size=9" in link
        with visitor(browser, link) as other:
            assert [metric(other, name) for name in ("Memory needed", "Training time", "Cost")] == shown
            assert other.get_by_role("heading", name="gpt2-medium on H100").is_visible()


def test_taking_a_change(address, browser):
    with visitor(browser, f"{address}/?model=gpt2-xl&batch_size=8") as page:
        page.get_by_text("Does not fit").first.wait_for()
        row = page.get_by_test_id("stHorizontalBlock").filter(has_text="checkpointing selective").last
        row.get_by_role("button", name="Apply").click()
        plan = est.Plan(batch_size=8, checkpointing="selective")
        needed = est.estimate("gpt2-xl", plan, "a100-80gb-sxm", **RUN).memory.needed
        page.get_by_text(f"Fits: a step needs {size(needed)}").wait_for()
        page.wait_for_function("location.search.includes('checkpointing=selective')")


def test_uploads(address, browser, tmp_path):
    config = {"model_type": "gpt2", "n_layer": 5, "n_embd": 320, "n_head": 5, "vocab_size": 32_000, "n_positions": 512}
    good, large = (tmp_path / f"{name}.json" for name in ("good", "large"))
    good.write_text(json.dumps(config))
    large.write_bytes(b" " * 50_000_000)
    with visitor(browser, f"{address}/?model=gpt2&batch_size=8") as page:
        page.get_by_text("From a config.json").click()
        before = metric(page, "Memory needed")
        upload = page.get_by_test_id("stFileUploaderDropzoneInput")
        upload.set_input_files(large)  # the browser does not send it
        page.get_by_test_id("stSidebar").get_by_text("5.0MB or smaller").first.wait_for()
        assert metric(page, "Memory needed") == before
        upload.set_input_files(good)
        page.get_by_role("heading", name="your own, like gpt2").wait_for()
        drawn(page)
        assert metric(page, "Memory needed") != before
        assert "own-gpt2.d_model=320" in page.url
        with visitor(browser, page.url) as other:
            assert metric(other, "Memory needed") == metric(page, "Memory needed")


CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 8}
CONFIG |= {"intermediate_size": 512, "vocab_size": 32_000, "max_position_embeddings": 1024, "tie_word_embeddings": True}
WRONG = (0, -1, 1.5, 10**30, "", "<b>x</b>", "![x](http://a.example/x.png)", None, [], {}, True, "\u202e", "é" * 3000)


def mangled(draw):
    """A config.json with something wrong in it: a value, a name, or the text itself."""
    config = dict(CONFIG)
    for _ in range(draw.randint(0, 2)):
        config[draw.choice([*config, "rope_scaling", "quantization_config"])] = draw.choice(WRONG)
    text = json.dumps(config).encode()
    cut = draw.randrange(len(text))
    return draw.choice((text, text, text[:cut], text[:cut] + bytes(draw.randbytes(3)) + text[cut:], b"[" * 9999, b""))


def test_mangled_uploads_are_refused_or_read(address, browser):
    """`UPLOADS=200 pytest tests/page/test_browser.py -k mangled` tries more."""
    draw, statuses = Random(5), set()
    with visitor(browser, f"{address}/?model=gpt2&batch_size=8") as page:
        page.get_by_text("From a config.json").click()
        for i in range(int(os.environ.get("UPLOADS", "4"))):
            file = {"name": f"{i}.json", "mimeType": "application/json", "buffer": mangled(draw)}
            with page.expect_response(lambda answer: "upload_file" in answer.url and answer.request.method == "PUT"):
                page.get_by_test_id("stFileUploaderDropzoneInput").set_input_files(file)
            page.get_by_text(f"{i}.json").first.wait_for()
            page.wait_for_function(
                "() => document.querySelector('[data-testid=stApp]').dataset.testScriptState === 'notRunning' && ("
                "document.querySelector('[data-testid=stMetric]') || document.body.innerText.includes('was refused'))"
            )
            assert page.get_by_test_id("stException").count() == 0
            assert page.locator("[data-testid=stMain] b, img[src*='a.example']").count() == 0
            statuses.add(page.get_by_text("The configuration was refused").count())
    assert statuses == {0, 1}  # both are tried
