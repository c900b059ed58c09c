"""Configurations side by side: what the sentence says is what the two answers say."""

import estimator as est
from estimator.answers.request import Request
from estimator.show.comparison import Figure, change, headline, measures, paid
from estimator.show.formatting import size

GPUS = ("a100-80gb-sxm", "h100-80gb-sxm")


def answer(gpu, **plan):
    q = Request("gpt2", est.preset("gpt2"), est.Plan(batch_size=4, **plan), gpu, 1, None, 1000, 64)
    r = q.estimate()
    return r, measures(r, paid(q, r), 7, "GiB")


def test_the_sentence_is_the_ratio_of_the_answers():
    (slow, a), (fast, b) = (answer(gpu) for gpu in GPUS)
    ratio = slow.time.seconds / fast.time.seconds
    saved = 1 - b["cost"].value / a["cost"].value
    assert headline(b, a) == f"{ratio:.1f}x faster, {saved:.0%} cheaper, as much memory"
    assert headline(a, a) == "as fast, as dear, as much memory"
    assert f"{ratio:.1f}x slower" in headline(a, b)


def test_less_memory_and_what_does_not_fit_are_said():
    (first, a), (second, b) = answer(GPUS[0]), answer(GPUS[0], checkpointing="block")
    assert f"{size(first.memory.needed - second.memory.needed)} less memory" in headline(b, a)
    wrong = a | {"fits": Figure("no")}
    assert headline(wrong, a).endswith("; it does not fit")
    assert headline(a, wrong).endswith("; it fits, which the other does not")


def test_changes_are_read_at_a_glance():
    one = Figure("100", 100.0)
    cases = [(310, "3.1x"), (150, "+50%"), (102, "+2.0%"), (77, "-23%"), (100, ""), (0, "-100%")]
    for now, text in cases:
        assert change(Figure(str(now), float(now)), one) == text
    assert change(Figure("sdpa"), Figure("naive")) == ""
