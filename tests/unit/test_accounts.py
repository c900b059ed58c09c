"""Closed forms: known answers, numbers against symbols, parts against wholes."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

import estimator as est
from estimator.accounting.accounts import FORMS, account, components, recipe_of
from estimator.accounting.sizes import sizes_of
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.eager.ledger import Category
from estimator.eager.letters import SYMBOLS


@st.composite
def models(draw):
    h = draw(st.sampled_from([1, 2, 3, 4, 6]))
    family = draw(st.sampled_from(["gpt2", "llama"]))
    L, V, C = draw(st.integers(1, 6)), draw(st.integers(1, 300)), draw(st.integers(1, 60))
    if family == "gpt2":
        return ModelConfig(family, L, h * draw(st.integers(1, 12)), h, V, C, tie_embeddings=draw(st.booleans()))
    k = draw(st.sampled_from([k for k in (1, 2, 3, 4, 6) if h % k == 0]))
    e = 2 * draw(st.integers(1, 6))
    d = draw(st.one_of(st.integers(1, 60), st.just(h * e)))
    tied, bias, window = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([None, None, 1, 8, 30]))
    return ModelConfig(family, L, d, h, V, C, k, e, draw(st.integers(1, 99)), tied, bias, window)


@st.composite
def plans(draw):
    return Plan(
        batch_size=draw(st.integers(1, 6)),
        attention=draw(st.sampled_from(["naive", "sdpa"])),
        checkpointing=draw(st.sampled_from(["none", "block"])),
        optimizer_impl=draw(st.sampled_from(["loop", "foreach", "fused", "bundled"])),
        grad_accumulation=draw(st.integers(1, 3)),
    )


@settings(max_examples=15, deadline=None)
@given(models(), plans(), st.sampled_from(["cpu", "cuda"]))
def test_symbols_numbers_and_vectors_agree(m, p, device):
    a = est.account(m, p, device)
    v = a.evaluate(m, p, threads=2)
    sizes = a.symbols_at(sizes_of(m, p.batch_size, p.tokens(m), threads=2))
    for form in (*FORMS, "peak_bytes"):
        assert getattr(a, form).xreplace(sizes) == getattr(v, form), form
    vector = a.lambdify()(
        B=np.array([p.batch_size, p.batch_size + 1, 1]), T=m.context_length, L=m.num_layers, d=m.d_model, n=2,
        h=m.num_heads, k=m.num_kv_heads, e=m.head_dim, f=m.d_ff, V=m.vocab_size, C=m.context_length,
        sliding_window=m.sliding_window,
    )  # fmt: skip
    scalars = [
        a.evaluate(m, p.replace(batch_size=b), threads=2).peak_bytes for b in (p.batch_size, p.batch_size + 1, 1)
    ]
    assert list(vector) == scalars


@settings(max_examples=15, deadline=None)
@given(models(), plans())
def test_every_breakdown_sums_to_its_total(m, p):
    v = est.account(m, p, "cpu").evaluate(m, p)
    assert tuple(v.modules) == components(recipe_of(m, p, "cpu"))
    for form in FORMS:
        assert sum(getattr(part, form) for part in v.modules.values()) == getattr(v, form)
    assert set(v.peak_categories) == {c.value for c in Category}
    assert sum(v.peak_categories.values()) == v.peak_bytes
    assert min(v.peak_categories.values()) >= 0


def test_gpt2_xl():
    """Parameters: the published model. FLOPs: 2 a multiply-add of L (12 d^2 T + 2 T^2 d) + V d T."""
    m = est.preset("gpt2-xl")
    v = est.account(m, Plan()).evaluate(m, Plan())
    assert v.parameters == 1_557_611_200
    assert v.forward_flops == 3_506_703_564_800
    assert v.backward_flops == 2 * v.forward_flops


def test_a_tied_head_is_counted_once_and_costs_its_product():
    m = est.preset("gpt2")
    tied, untied = (est.account(x, Plan()).evaluate(x, Plan()) for x in (m, m.replace(tie_embeddings=False)))
    assert untied.parameters - tied.parameters == m.vocab_size * m.d_model
    assert untied.forward_flops == tied.forward_flops
    assert tied.modules["embedding"].forward_flops == 0


def test_selective_checkpointing_recomputes_the_unfused_scores_and_their_weighted_sum_and_nothing_else():
    m = ModelConfig("llama", 4, 32, 4, 101, 32, 2, 8, 33)
    for every, recomputed in ((1, 4), (2, 2), (3, 1)):
        naive, sdpa = (
            Plan(batch_size=2, attention=name, checkpointing="selective", checkpoint_every=every)
            for name in ("naive", "sdpa")
        )
        assert est.account(m, naive).evaluate(m, naive).recompute_flops == recomputed * 2 * (2 * 2 * 32 * 32 * 32)
        plain = sdpa.replace(checkpointing="none", checkpoint_every=1)
        flash, fully = (est.account(m, p).evaluate(m, p) for p in (sdpa, plain))
        assert flash.recompute_flops == fully.recompute_flops  # what flash attention repeats anyway


def test_checkpointing_recomputes_all_but_the_last_product_of_each_block():
    m = est.preset("gpt2")
    plain, saving = (
        est.account(m, p).evaluate(m, p) for p in (Plan(batch_size=2), Plan(batch_size=2, checkpointing="block"))
    )
    BT = 2 * m.context_length
    skipped = 2 * BT * m.d_model * m.d_ff * m.num_layers
    head = 2 * BT * m.d_model * m.vocab_size
    assert saving.recompute_flops == plain.forward_flops - head - skipped
    assert saving.backward_flops == plain.backward_flops + saving.recompute_flops
    assert saving.activation_bytes < plain.activation_bytes / 5


def test_a_batch_of_one_keeps_its_letter_in_every_form_but_the_peak():
    m = est.preset("gpt2-xl")
    a = account(m, Plan(batch_size=1))
    B = SYMBOLS["B"]
    assert B in a.activation_bytes.free_symbols
    assert B in a.forward_flops.free_symbols
    assert B not in a.peak_bytes.free_symbols
    assert B in account(m, Plan(batch_size=2)).peak_bytes.free_symbols


def test_the_peak_is_a_max_and_latex_can_be_had_of_every_form():
    m = est.preset("llama-3.2-1b")
    a = account(m, Plan(batch_size=2))
    assert isinstance(a.peak_bytes, sympy.Max)
    assert len(a.peak_bytes.args) == len(a.pieces) < 60
    for form in (*FORMS, "peak_bytes"):
        assert a.latex(form)
    assert sum(a.by_module("parameters").values()).expand() == a.parameters


def test_devices_differ_by_scalars_and_scratch_only():
    m, p = est.preset("gpt2"), Plan(batch_size=4, optimizer_impl="fused", loss="torch")
    cpu, cuda = (account(m, p, device).evaluate(m, p, threads=1) for device in ("cpu", "cuda"))
    assert cpu.activation_bytes == cuda.activation_bytes
    assert 0 <= cpu.peak_bytes - cuda.peak_bytes < 2 * 4 * m.d_model + 100 + 8 * m.num_layers


def test_what_cannot_be_is_refused():
    m = est.preset("gpt2")
    with pytest.raises(ConfigError, match="device = 'tpu'"):
        account(m, Plan(), "tpu")
    with pytest.raises(ConfigError, match="seq_len = 2048: the model holds 1024"):
        account(m, Plan(seq_len=2048))
    f = account(m, Plan()).lambdify()
    with pytest.raises(ConfigError, match="T is missing"):
        f(B=1, L=2, d=8, h=2, V=10, C=4)
    with pytest.raises(ConfigError, match="B = 0"):
        f(B=[1, 0], T=4, L=2, d=8, h=2, V=10)
    with pytest.raises(ConfigError, match="letter = 'X'"):
        f(X=1)
    with pytest.raises(ConfigError, match="form = 'bytes'"):
        account(m, Plan()).latex("bytes")
    with pytest.raises(AttributeError, match="peak_bytes"):
        account(m, Plan()).peek_bytes  # noqa: B018 - the access is what is tested


def test_a_window_is_followed_over_sequence_lengths_or_asked_for():
    m, p = ModelConfig("llama", 3, 32, 2, 101, 64, d_ff=40, sliding_window=16), Plan(attention="sdpa", precision="bf16")
    sizes = {"B": 1, "L": 3, "d": 32, "h": 2, "f": 40, "V": 101, "C": 64}
    lengths = [1, 16, 17, 32, 64]
    for T in (16, 64):  # whichever side the account itself is on
        found = account(m, p.replace(seq_len=T)).lambdify()(T=lengths, **sizes, sliding_window=16)
        assert list(found) == [account(m, q).evaluate(m, q).peak_bytes for q in (p.replace(seq_len=T) for T in lengths)]
    with pytest.raises(ConfigError, match="sliding_window is missing"):
        account(m, p).lambdify()(T=64, **sizes)


def own_elements(m, count):
    """What an accelerator has of each part's parameters: by hand, of every matrix and vector its rows, rounded up."""
    d, f, q, kv = m.d_model, m.f, m.width_of_heads, m.kv_heads * m.e

    def rows(n):
        return -(-n // count)

    L, table = m.num_layers, rows(m.vocab_size) * d
    return {
        "embedding": table,
        "attention": L * (rows(q) * d + 2 * rows(kv) * d + rows(d) * q),
        "feed-forward": L * (2 * rows(f) * d + rows(d) * f),
        "norms": (2 * L + 1) * rows(d),
        "head": 0 if m.tie_embeddings else table,
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2", "zero3"])
def test_every_part_shows_its_own_parameters_gradients_and_states(sharding, tied, device):
    """By hand, for rows that do not divide: 4 bytes an element each, states twice; the parts add up to the whole."""
    m = ModelConfig("llama", 5, 22, 6, 103, 40, 2, 6, 31, tie_embeddings=tied)
    for precision, accumulation in (("fp32", 1), ("bf16-mixed", 2)):
        p = Plan(
            precision=precision,
            grad_accumulation=accumulation,
            sharding=sharding,
            data_parallel=4,
            optimizer_impl="bundled",
        )
        whole, shared = own_elements(m, 1), own_elements(m, 4)
        v = est.account(m, p, device).evaluate(m, p)
        held = shared if sharding in ("zero2", "zero3") else whole
        for form, elements, width in (
            ("parameters", whole, 1),
            ("parameter_bytes", held, 4),
            ("gradient_bytes", held, 4),
            ("optimizer_bytes", whole if sharding == "none" else shared, 8),
        ):
            found = {name: getattr(part, form) for name, part in v.modules.items()}
            assert found == {name: width * elements.get(name, 0) for name in v.modules}, form
            assert sum(found.values()) == getattr(v, form)


def test_the_json_has_a_parts_gradients_under_zero3():
    m, p = est.preset("gpt2"), Plan(sharding="zero3", data_parallel=8, grad_accumulation=2)
    plain = est.estimate(m, p, "a100-80gb-sxm").to_dict()
    parts = plain["modules"]
    assert all(part["gradient_bytes"] == part["parameter_bytes"] for part in parts.values())
    assert parts["attention"]["gradient_bytes"] > 0
    assert parts["residual"]["gradient_bytes"] == parts["loss"]["gradient_bytes"] == 0


def test_an_untied_head_has_a_row_for_each_word_whatever_the_positions_are():
    m = est.preset("gpt2").replace(tie_embeddings=False)  # learned positions have a row for each position
    p = est.Plan(seq_len=64)
    head = account(m, p).evaluate(m, p).modules["head"]
    assert head.parameters == m.vocab_size * m.d_model
    assert head.parameter_bytes == 4 * head.parameters
