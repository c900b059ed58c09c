"""The decoder of parts: every part runs both ways, sees no later token, and does the same by every kernel."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.parts import MLP, Attention, Ends, Experts, Layer, Norm, Parts, Pattern, Positions
from estimator.describe.plan import Plan
from trainer.model.decoder import build_model
from trainer.model.generate import generate
from trainer.model.grouped import grouped_product
from trainer.model.router import deal_out, load_balancing_loss
from trainer.optim.optimizers import is_for_muon, is_matrix
from trainer.referee.measure import build_optimizer, build_step

pytestmark = pytest.mark.usefixtures("one_thread")

V, C, T = 23, 16, 13


SIZES = {"num_layers": 4, "d_model": 32, "num_heads": 4, "vocab_size": V, "context_length": C, "d_ff": 24}
GROUPED = {"num_kv_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "d_expert": 12}
LATENT = {"kv_rank": 6, "rope_dim": 4, "nope_dim": 8}
LN = Norm("layer", bias=True)
RMS1 = Norm(weight="plus-one")
SPARSE, WINDOW, FULL = Layer(sparse=True), Layer("window"), Layer()

MODELS = {
    "gpt2": ModelConfig("gpt2", **SIZES),
    "llama": ModelConfig("llama", **SIZES, **GROUPED),
}


def declare(name, parts, sizes=None, **more):
    MODELS[name] = ModelConfig(name, **{**SIZES, **(GROUPED if sizes is None else sizes), **more}, parts=parts)


declare("post, norms over the width", Parts(order="post", attention=Attention(qk_norm="width")))
declare(
    "sandwich, 1 + w, capped, windows",
    Parts(
        norm=RMS1,
        order="sandwich",
        attention=Attention(softcap=50, scale=0.2, qk_norm="head", qk_norm_kind=RMS1),
        ends=Ends(tied=True, embedding_scale=5, logits_softcap=30),
    ),
    pattern=Pattern(cycle=(WINDOW, FULL)),
    sliding_window=5,
)
declare(
    "normed sums, fused, learned positions, projections",
    Parts(
        norm=LN,
        order="post-sum",
        attention=Attention(fused=True, bias=True, out_bias=True),
        positions=Positions("learned", extra_rows=2),
        mlp=MLP(gated=False, activation="gelu_new", bias=True),
        ends=Ends(final_norm=False, tied=True),
    ),
    embedding_dim=20,
)
declare(
    "parallel, norms of each head, neighbours of a part",
    Parts(
        norm=Norm("layer"),
        order="parallel",
        attention=Attention(qk_norm="head-own", qk_norm_kind=Norm("layer")),
        positions=Positions(pairs="neighbours"),
        ends=Ends(logits_scale=0.25, head_bias=True),
    ),
    rotary_dim=4,
)
declare(
    "parallel with two norms, clipped, residuals scaled",
    Parts(
        norm=Norm("layer", "plus-one", bias=True),
        order="parallel-two",
        residual_scale=0.3,
        attention=Attention(fused=True, clip=0.3),
        mlp=MLP(gated=False, activation="relu2"),
    ),
)
declare(
    "alibi, normed embedding, windows",
    Parts(
        norm=LN,
        attention=Attention(fused=True, bias=True, clip=2.0),
        positions=Positions("alibi"),
        mlp=MLP(gated=False, activation="gelu"),
        ends=Ends(embedding_norm=True),
    ),
    pattern=Pattern(cycle=(WINDOW, FULL)),
    sliding_window=5,
)
declare(
    "sinusoids, fused gate, sub-norms, no weights in norms",
    Parts(
        norm=Norm("layer", "none"),
        attention=Attention(out_norm=True, query_scaling="all"),
        positions=Positions("sinusoidal"),
        mlp=MLP(activation="gelu_tanh", bias=True, fused=True, down_norm=True),
    ),
)
declare(
    "chunks, unrotated layers, inputs of experts weighed",
    Parts(
        attention=Attention(
            qk_norm="head", qk_norm_late=True, qk_norm_kind=Norm(weight="none"), query_scaling="unrotated"
        ),
        experts=Experts("sigmoid-all", shared="plain"),
    ),
    pattern=Pattern(cycle=(Layer("chunk"), Layer("chunk", sparse=True), Layer(rotates=False))),
    attention_chunk=6,
    d_shared=10,
    **EXPERTS,
)
declare(
    "attention behind a gate, a correction that is a parameter, a norm over the experts, and of the head's rows",
    Parts(
        order="sandwich",
        attention=Attention(qk_norm="head", out_gate=True),
        experts=Experts("sigmoid-chosen", correction="parameter", shared="plain", averaged=True, out_norm=True),
        ends=Ends(head_norm=True),
    ),
    pattern=Pattern((FULL,), (Layer("window", sparse=True), Layer(rotates=False, sparse=True))),
    sliding_window=5,
    d_shared=10,
    **EXPERTS,
)
declare(
    "latent, groups of experts, shared",
    Parts(
        attention=Attention(latent="keys-and-queries", bias=True, out_bias=True),
        positions=Positions(pairs="neighbours"),
        experts=Experts("sigmoid", correction="buffer", grouped=True, scaling=2.5, shared="plain"),
    ),
    LATENT | EXPERTS,
    query_rank=10,
    value_dim=12,
    expert_groups=2,
    groups_per_token=1,
    d_shared=12,
    pattern=Pattern((FULL,), (SPARSE,)),
)
declare(
    "latent keys, values of another width, gated shared expert",
    Parts(
        attention=Attention(latent="keys"),
        experts=Experts("softmax", normalised=False, grouped=True, shared="gated"),
    ),
    LATENT | EXPERTS,
    value_dim=20,
    expert_groups=4,
    groups_per_token=3,
    d_shared=12,
    d_ff=None,
)
declare(
    "sinks, biased experts",
    Parts(
        attention=Attention(bias=True, out_bias=True, sinks=True),
        experts=Experts("logits", router_bias=True, bias=True, activation="clamped-swiglu"),
    ),
    pattern=Pattern(cycle=(Layer("window", sparse=True), SPARSE)),
    sliding_window=5,
    d_ff=None,
    **EXPERTS,
)
declare(
    "experts of attention, xIELU in dense layers",
    Parts(
        attention=Attention(experts=True),
        mlp=MLP(gated=False, activation="xielu"),
        experts=Experts("sparse-mixer", out_bias=True),
    ),
    GROUPED | EXPERTS,
    pattern=Pattern(cycle=(FULL, SPARSE)),
)

ON_CPU = ("naive", "naive-fp32", "sdpa", "sdpa-math")
models = pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)


def build(m, attention="naive", seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = build_model(m, Plan(attention=attention)).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():  # far from the initial weights, whose logits are nearly alike
            weight.mul_(4).add_(torch.randn_like(weight), alpha=0.1)
    return model


def kernels(m):
    """Those of `ON_CPU` that the model can have."""
    return [name for name in ON_CPU if not (name.startswith("sdpa") and m.unfused)]


@models
def test_all_kernels_agree_and_every_parameter_learns(m):
    ids = torch.randint(V, (2, T))
    logits = []
    for name in kernels(m):
        model = build(m, name)
        logits.append(model(ids))
        F.cross_entropy(logits[-1].flatten(0, 1), ids.flatten()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad] == []
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-4)  # "naive-fp32" is in the list


@models
def test_no_token_sees_a_later_one(m):
    model, ids = build(m), torch.randint(V, (2, T))
    later = ids.clone()
    later[:, 7] = (later[:, 7] + 1) % V
    with torch.no_grad():
        moved = (model(ids) - model(later)).abs().amax((0, 2)) > 1e-9
    assert not moved[:7].any()
    assert moved[7]


@models
@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_cached_logits_equal_uncached_ones(m, attention):
    if attention == "sdpa" and m.unfused:
        return
    model, ids = build(m, attention), torch.randint(V, (2, T))
    cache = model.new_cache(2)
    with torch.no_grad():
        pieces = torch.cat([model(ids[:, a:b], cache) for a, b in pairwise((0, 5, 6, 9, T))], 1)
        # Experts are weighed in float32.
        torch.testing.assert_close(pieces, model(ids), rtol=1e-6, atol=1e-6)


@models
def test_generation_goes_on_beyond_the_context(m):
    model = build(m)
    cached, uncached = (generate(model, torch.tensor([[1, 2, 3]]), 16, 0, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@models
@pytest.mark.parametrize("checkpointing", ["block", "selective", "attention"])
def test_checkpointing_changes_no_gradient(m, checkpointing):
    ids = torch.randint(V, (2, T))
    gradients = []
    for p in (Plan(), Plan(checkpointing=checkpointing)):
        torch.manual_seed(0)
        model = build_model(m, p)
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        gradients.append([w.grad for w in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


@models
def test_the_chunked_loss_is_that_of_the_logits_or_refused(m):
    ends = m.made_of.ends
    if ends.head_bias or ends.head_norm or ends.logits_softcap is not None:
        with pytest.raises(ConfigError, match=r"loss = 'chunked': .*allowed are bundled, torch, torch-fp32"):
            build_model(m, Plan(loss="chunked"))
        return
    model, ids = build(m), torch.randint(V, (2, T))
    wanted = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    torch.testing.assert_close(model(ids, targets_BT=ids), wanted)


@models
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_half_precision_trains(m, precision):
    step = build_step(m, Plan(precision=precision, batch_size=2, optimizer="muon"))
    before = [p.detach().clone() for p in step.model.parameters()]
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    assert all(p.isfinite().all() for p in step.model.parameters())


def test_fused_kernels_have_no_soft_cap_and_no_sinks():
    for m in MODELS.values():
        if m.unfused:
            for name in ("sdpa", "sdpa-math", "sdpa-flash", "sdpa-efficient"):
                with pytest.raises(ConfigError, match=f"attention = '{name}': .*allowed are naive, naive-fp32"):
                    Plan(attention=name).attention_kernel("cuda", m)


def test_values_of_another_width_have_no_flash():
    m = MODELS["latent, groups of experts, shared"]
    wide = MODELS["latent keys, values of another width, gated shared expert"]
    assert m.value_e == m.e
    assert Plan(attention="sdpa").attention_kernel("cpu", m) == "flash"
    assert Plan(attention="sdpa").attention_kernel("cpu", wide) == "math"
    assert (wide.e, wide.value_e) == (12, 20)  # multiples of 16 bytes in fp32 alone
    assert Plan(attention="sdpa").attention_kernel("cuda", wide) == "efficient"
    assert Plan(attention="sdpa", precision="bf16").attention_kernel("cuda", wide) == "math"
    with pytest.raises(ConfigError, match="it takes heads whose width is a multiple of 8 in this dtype"):
        Plan(attention="sdpa-efficient", precision="bf16").attention_kernel("cuda", wide)
    with pytest.raises(ConfigError, match=r"attention = 'sdpa-flash': .*of 12 and 20"):
        build_model(wide, Plan(attention="sdpa-flash"))


def test_a_chunk_is_seen_from_its_start():
    """One layer: the logits of a token are those of its chunk alone, where positions are only rotated."""
    m = ModelConfig("x", **{**SIZES, "num_layers": 1}, parts=Parts(), pattern=Pattern(cycle=(Layer("chunk"),)),
                    attention_chunk=5)  # fmt: skip
    for attention in kernels(m):
        model, ids = build(m, attention), torch.randint(V, (2, T))
        with torch.no_grad():
            torch.testing.assert_close(model(ids)[:, 5:10], model(ids[:, 5:10]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [8, 0, 0, 0], [2, 2, 2, 2]])
def test_the_grouped_product_is_a_product_for_each_group(counts):
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    pieces = [rows @ w.T for rows, w in zip(x.split(counts), weight, strict=True)]
    torch.testing.assert_close(grouped_product(x, weight, torch.tensor(counts)), torch.cat(pieces))
    assert torch.autograd.gradcheck(lambda x, w: grouped_product(x, w, torch.tensor(counts)), (x, weight))


def test_dealt_out_choices_are_even_or_as_uneven_as_asked():
    for routing, share in (("even", 1.0), (2.5, 2.5), (100.0, 4.0)):
        chosen = torch.empty(64, 2, dtype=torch.int64)
        assert deal_out(chosen, 8, routing) is chosen
        counts = torch.bincount(chosen.view(-1), minlength=8)
        assert counts[0] == share * 16
        assert (chosen[:, 0] != chosen[:, 1]).all()
        assert counts[1:].max() - counts[1:].min() <= 2
        if routing == "even":
            assert chosen[:3].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_routing_by_hand_changes_no_shape_and_still_learns():
    m = MODELS["latent, groups of experts, shared"]
    ids = torch.randint(V, (2, 12))
    outputs = []
    for routing in ("learned", "even", 2.0):
        model = build(m)
        for router in model.routers():
            router.routing = routing
        outputs.append(model(ids))
        outputs[-1].sum().backward()
        assert all(router.weight.grad.abs().sum() > 0 for router in model.routers())
    assert not torch.allclose(outputs[0], outputs[1])


def test_the_balancing_loss_is_one_where_all_is_even_and_reaches_the_router():
    even = torch.full((8, 4), 0.25)
    chosen = deal_out(torch.empty(8, 2, dtype=torch.int64), 4, "even")
    assert load_balancing_loss(even, chosen) == pytest.approx(1.0)
    assert load_balancing_loss(torch.eye(4)[[0] * 8], torch.zeros(8, 1, dtype=torch.int64)) == pytest.approx(4.0)
    model = build(MODELS["sinks, biased experts"])
    with pytest.raises(RuntimeError, match="watched"):
        model.load_balancing_loss()
    for router in model.routers():
        router.watched = True
    model(torch.randint(V, (2, T)))
    model.load_balancing_loss().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.routers())


def test_a_routers_balancing_loss_is_in_its_gradient_and_nowhere_else():
    m = MODELS["latent, groups of experts, shared"]
    ids = torch.randint(V, (2, T))
    gradients = []
    for balance in (0.0, 0.25):
        torch.manual_seed(0)
        model = build_model(m, Plan(balance=balance))
        for router in model.routers():
            router.watched = True
        logits = model(ids)
        losses = [router.loss for router in model.routers()]
        (logits.sum() + (0.25 - balance) * torch.stack(losses).sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(losses) > 1
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_experts_are_chosen_within_the_best_groups():
    m = MODELS["latent keys, values of another width, gated shared expert"]
    (router, *_) = build(m).routers()
    scores = torch.rand(50, 4)
    chosen = router.choose(scores)
    worst = scores.argmin(-1)  # four groups of one, of which three are kept
    assert (chosen != worst[:, None]).all()


def test_muon_takes_matrices_of_two_dimensions():
    for name in ("sinks, biased experts", "parallel, norms of each head, neighbours of a part"):
        named = dict(build(MODELS[name]).named_parameters())
        muon = {n for n, p in named.items() if is_for_muon(n, p)}
        assert {n.split(".")[-2] for n in muon} <= {"q", "k", "v", "out", "router", "gate", "up", "down"}
        assert all(n.startswith("blocks.") for n in muon)
        assert all(is_matrix(n, named[n]) for n in muon)
        assert not any(is_matrix(n, p) for n, p in named.items() if "norm" in n or "bias" in n)
        optimizer = build_optimizer(named, Plan(optimizer="muon"), "cpu")
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
