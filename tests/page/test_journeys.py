"""What people come for, in a real browser, each with the number of clicks that it takes."""

import re
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("streamlit", reason="the page needs the app extra: pip install -e '.[app]'")
from page_browser import drawn, metric, shoot, violations, visitor

from app_pages import scenarios


class Clicks:
    """Clicks, counted; typing into a box that has the focus is none."""

    def __init__(self):
        self.number = 0

    def on(self, locator):
        locator.click()
        self.number += 1


def fill(clicks, page, label, text, inside="stMain"):
    clicks.on(page.get_by_test_id(inside).get_by_label(label, exact=True).first)
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def options(page):
    """The rows of the page Plan, as text; the link of each is its last."""
    rows = page.get_by_test_id("stHorizontalBlock").filter(has=page.get_by_role("link", name="Estimate it"))
    return [row.inner_text() for row in rows.all()]


def test_what_can_be_trained_for_so_much_money(address, browser):
    """From the first screen to a whole configuration that fits, in three clicks."""
    clicks = Clicks()
    with visitor(browser, f"{address}/?model=gpt2&batch_size=8") as page:
        clicks.on(page.get_by_test_id("stTopNavLink").filter(has_text="Plan"))
        fill(clicks, page, "Budget, $", "300")
        page.get_by_text("Largest: ").wait_for()
        drawn(page)
        shoot(page, "plan")
        promised = options(page)[0]
        clicks.on(page.get_by_role("link", name="Estimate it").first)
        page.get_by_text("Fits: a step needs").first.wait_for()
        drawn(page)
        # What the plan promised is what the estimate says.
        assert f", {metric(page, 'Memory needed')}, MFU" in promised
        assert f"{setting(page, 'count')} x {setting(page, 'gpu')}: " in promised
        with visitor(browser, page.url) as other:
            assert metric(other, "Memory needed") == metric(page, "Memory needed")
    assert clicks.number == 3


def setting(page, name):
    """What the link says of an input."""
    return parse_qs(urlsplit(page.url).query).get(name, [str(scenarios.DEFAULTS[name])])[0]


def test_the_cheapest_card_for_tokens_in_so_many_days(address, browser):
    """Three clicks, the cheapest first; the same is a link; a fourth opens the cheapest as an estimate that fits."""
    clicks = Clicks()
    with visitor(browser, f"{address}/?model=gpt2&batch_size=8") as page:
        clicks.on(page.get_by_test_id("stTopNavLink").filter(has_text="Plan"))
        fill(clicks, page, "Tokens, billions", "26")
        page.wait_for_function("location.search.includes('plan.tokens=26')")
        fill(clicks, page, "Days", "3")
        page.wait_for_function("location.search.includes('plan.days=3')")
        page.get_by_text("Cheapest: 1.29B parameters on 26.0B tokens").wait_for()
        drawn(page)
        found = [re.search(r", \$([\d,]+)\n(?s:.*)an hour at .+, \d{4}-\d\d-\d\d", row) for row in options(page)]
        paid = [float(dollars[1].replace(",", "")) for dollars in found]
        assert paid == sorted(paid)
        with visitor(browser, f"{address}/plan?plan.tokens=26&plan.days=3") as other:
            assert options(other) == options(page)
        clicks.on(page.get_by_role("link", name="Estimate it").first)
        page.get_by_text("Fits: a step needs").first.wait_for()
    assert clicks.number == 4


def test_from_out_of_memory_to_a_set_that_fits_is_a_click(address, browser):
    clicks = Clicks()
    with visitor(browser, f"{address}/?model=gpt2-xl&batch_size=8") as page:
        assert "Does not fit" in page.get_by_test_id("stAlert").first.inner_text()
        assert page.get_by_test_id("stMetric").filter(has_text="Training time").get_by_text("if it fitted").is_visible()
        shoot(page, "does-not-fit")
        clicks.on(page.get_by_role("button", name="Apply").first)
        page.get_by_text("Fits: a step needs").first.wait_for()
    assert clicks.number == 1


def test_sharding_is_offered_where_replicas_do_not_fit(address, browser):
    clicks = Clicks()
    with visitor(browser, f"{address}/?model=gpt2-xl&gpu=rtx-4090-24gb&count=8&attention=sdpa&seq_len=256") as page:
        assert "Does not fit" in page.get_by_test_id("stAlert").first.inner_text()
        row = page.get_by_test_id("stHorizontalBlock").filter(has_text="FSDP").last
        clicks.on(row.get_by_role("button", name="Apply"))
        page.get_by_text("Fits: a step needs").first.wait_for()
        drawn(page)
        assert "sharding=zero3" in page.url
    assert clicks.number == 1


def test_the_course_is_on_the_first_screen_and_its_derivation_a_link(address, browser):
    clicks = Clicks()
    with visitor(browser, address) as page:
        assert "model=gpt2" in page.url  # the first screen has a link of its own
        shoot(page, "first-screen")
        clicks.on(page.get_by_role("button", name="GPT-2 XL on an A100 (the course)"))
        page.get_by_role("heading", name="gpt2-xl on A100").wait_for()
        drawn(page)
        assert metric(page, "Max micro-batch") == "5"
        assert "model" not in page.url.replace("?model=gpt2-xl", "")
    assert clicks.number == 1
    with visitor(browser, f"{address}/course#batch") as page:
        assert page.get_by_text("(80 - 24.88) / 15.52 = 3.55").is_visible()
        assert page.get_by_text("122,765 hours = 14.0 years").is_visible()
        assert page.get_by_role("link", name="Estimate it").get_attribute("href").endswith("gpu=a100-80gb-sxm")
        shoot(page, "course")


def test_a_link_and_a_page_to_send(address, browser, tmp_path):
    """The link is that of the page, also after a change; the snapshot has its figures and needs no server."""
    clicks = Clicks()
    with visitor(browser, f"{address}/?model=gpt2&batch_size=8") as page:
        fill(clicks, page, "Micro-batch", "9", inside="stSidebar")
        page.wait_for_function("location.search.includes('batch_size=')")
        drawn(page)
        link = page.get_by_test_id("stCode").first
        link.get_by_text(page.url).wait_for()
        with page.expect_download() as download:
            clicks.on(page.get_by_role("button", name="Page (HTML)"))
        file = tmp_path / "snapshot.html"
        download.value.save_as(file)
        needed, url = metric(page, "Memory needed"), page.url
        page.goto(f"file://{file}")
        assert page.get_by_text(f"a step needs {needed} of").is_visible()
        assert page.get_by_role("link", name=url).is_visible()
        assert violations(page) == []
    assert clicks.number == 2


def test_a_refused_upload_leaves_nothing_of_the_model_before_it(address, browser, tmp_path):
    clicks = Clicks()
    broken = tmp_path / "config.json"
    broken.write_text('{"model_type": "mamba2"}')
    with visitor(browser, f"{address}/?model=gpt2&batch_size=8") as page:
        before = metric(page, "Memory needed")
        clicks.on(page.get_by_text("From a config.json"))
        page.get_by_test_id("stFileUploaderDropzoneInput").set_input_files(broken)
        page.get_by_test_id("stMain").get_by_text("The configuration was refused").wait_for()
        page.get_by_test_id("stMetric").first.wait_for(state="detached")
        assert before not in page.get_by_test_id("stMain").inner_text()
        clicks.on(page.get_by_role("button", name="Go on with gpt2"))
        drawn(page)
        assert metric(page, "Memory needed") == before
    assert clicks.number == 2


def test_a_page_without_inputs_in_the_sidebar_is_left_as_any_other(address, browser):
    """On a phone the names of the pages are in the sidebar, on a wide screen on top."""
    with visitor(browser, f"{address}/course", width=390, height=844) as page:
        page.get_by_test_id("stExpandSidebarButton").click()
        assert not page.get_by_test_id("stSidebar").get_by_text("Micro-batch").is_visible()
        page.get_by_test_id("stSidebar").get_by_text("Estimate", exact=True).click()
        page.get_by_text("Memory needed").first.wait_for()
        page.goto(f"{address}/course")
        page.set_viewport_size({"width": 1440, "height": 1000})
        drawn(page)
        assert not page.get_by_test_id("stSidebar").is_visible()
