"""The Python and the command of a request give its figures when they are run, and the reports hold them."""

import contextlib
import csv
import io
import json
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import estimator as est
from estimator.answers.request import Request
from estimator.show import commands
from estimator.show.formatting import hours, size
from estimator.show.report import to_csv, to_json, to_markdown
from estimator.show.snapshot import to_html

GPT2 = est.preset("gpt2-xl")
CASES = [
    Request("gpt2-xl", GPT2, est.Plan(), "a100-80gb-sxm", mfu=0.5, steps=400_000, global_batch_size=1024),
    Request("gpt2-xl", GPT2.replace(d_model=1280, num_heads=20), est.Plan(attention="sdpa"), "h100-80gb-sxm", count=8),
    Request("gpt2-xl", GPT2.replace(num_layers=3, tie_embeddings=False), est.Plan(batch_size=2), "l4-24gb", mfu=0.3),
    Request("own", est.preset("gpt2"), est.Plan(checkpointing="block"), "t4-16gb", steps=10, mfu=0.25),
    Request("own", est.preset("qwen2.5-0.5b"), est.Plan(seq_len=512, max_grad_norm=1.0), "rtx-4090-24gb", mfu=0.4),
    Request("mistral-7b", est.preset("mistral-7b").replace(sliding_window=None), est.Plan(), "h200-141gb-sxm"),
    Request("gpt2-xl", GPT2.replace(sliding_window=256), est.Plan(attention="sdpa"), "h200-141gb-sxm"),
    Request(
        "llama-3-8b",
        est.preset("llama-3-8b"),
        est.Plan(precision="bf16-fsdp", sharding="zero3"),
        "h100-80gb-sxm",
        64,
        network=6.25e9,
        attention_kernel="flash-2",
        clock=1_500,
        overlap=False,
        wide=("norm", "rotation"),
    ),
    Request("llama-3-8b", est.preset("llama-3-8b").replace(d_ff=1000), est.Plan(optimizer="sgd"), "h200-141gb-sxm"),
]


@pytest.mark.parametrize("request_", CASES)
def test_the_python_gives_the_figures_when_it_is_run(request_):
    r = request_.estimate()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(request_.python(), {})  # noqa: S102 - that it runs is what is tested
    first, second = out.getvalue().splitlines()
    assert first == f"{r.memory.needed} {r.fits} {r.time and r.time.hours}"
    assert int(second) == est.max_batch_size(request_.model, r.plan, request_.gpu)


@pytest.mark.parametrize("request_", CASES)
def test_the_command_gives_the_figures_when_it_is_run(request_, capsys):
    name, *words = shlex.split(request_.command())
    assert name == "estimate"
    assert commands.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(request_.estimate().to_dict()))


def test_the_reports_hold_the_figures():
    request_ = CASES[0]
    r = request_.estimate()
    spent = est.cost(request_.gpu, r.time.seconds)
    assert json.loads(to_json(request_, spent))["memory"]["needed"] == r.memory.needed
    rows = list(csv.DictReader(io.StringIO(to_csv(request_))))
    assert sum(int(row["parameters"]) for row in rows if row["module"] != "total") == r.values.parameters
    assert {row["precision"] for row in rows} == {r.plan.precision}
    assert {row["command"] for row in rows} == {request_.command()}
    text = to_markdown(request_, spent)
    for figure in (f"{r.memory.needed:,}", f"{r.values.parameters:,}", "122,765 h", request_.command()):
        assert figure in text


class Read(HTMLParser):
    """The texts of a page, and what it would fetch or run."""

    def __init__(self):
        super().__init__()
        self.texts, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "img", "iframe") or any(name in ("src", "onload", "onclick") for name, _ in attrs):
            self.outside.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_the_snapshot_needs_nothing_else_and_holds_the_figures():
    request_ = replace(CASES[0], name="<script>alert(1)</script>")
    r = request_.estimate()
    page = Read()
    page.feed(to_html(request_, est.cost(request_.gpu, r.time.seconds), link="http://x.example/?a=1&b=2"))
    assert page.outside == []
    for figure in (size(r.memory.needed), f"{r.values.parameters:,}", hours(r.time.seconds), request_.command()):
        assert any(figure in text for text in page.texts)
    assert any("<script>" in text for text in page.texts)  # as it is written
