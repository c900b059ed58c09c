"""The page without a browser: every figure on it is the library's, every input reaches the library."""

import pytest

import estimator as est
from estimator.formatting import hours, size

pytest.importorskip("streamlit", reason="the page needs the app extra: pip install -e '.[app]'")
from streamlit.testing.v1 import AppTest

GPU = "a100-80gb-sxm"


def opened(**query):
    at = AppTest.from_file("../app.py", default_timeout=60)
    for key, value in query.items():
        at.query_params[key] = value
    at.run()
    assert not at.exception, at.exception[0].value
    return at


def metrics(at):
    return {m.label: m.value for m in at.metric}


def test_it_opens_on_gpt2_xl_on_an_a100():
    at = opened()
    r = est.estimate("gpt2-xl", est.Plan(), GPU, mfu=0.5, steps=400_000, global_batch_size=1024)
    shown = metrics(at)
    assert shown["Memory needed"] == size(r.memory.needed)
    assert shown["Training time"] == hours(r.time.seconds)
    assert shown["Largest micro-batch"] == str(est.max_batch_size("gpt2-xl", est.Plan(), GPU))
    assert at.success[0].value.startswith("Fits")
    assert not at.error


def test_what_does_not_fit_is_said_so():
    at = opened(batch_size="8")
    assert at.error[0].value.startswith("Does not fit")


def test_a_bad_size_shows_one_message_and_leaves_the_rest():
    at = opened(**{"gpt2-xl.d_model": "1601"})
    assert [e.value for e in at.error] == ["d_model = 1601: must be divisible by num_heads (25), or give head_dim"]
    assert metrics(at)["Memory needed"]


def test_a_sequence_that_is_too_long_shows_one_message_and_leaves_the_rest():
    at = opened(seq_len="2048")
    assert [e.value for e in at.error] == ["seq_len = 2048: the model holds 1024 positions (context_length)"]
    assert metrics(at)["Memory needed"] == metrics(opened())["Memory needed"]
