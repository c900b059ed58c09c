"""Bad input gets one clear error that names the field, the value and what is allowed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.describe.checks import ConfigError, choose
from estimator.describe.model import ModelConfig
from estimator.describe.parts import GPT2, LLAMA, MLP, Attention, Ends, Experts, Layer, Norm, Parts, Pattern, Positions
from estimator.describe.plan import Plan


def model(**changes):
    fields = {"family": "gpt2", "num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_size": 10, "context_length": 8}
    return ModelConfig(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers = 0: must be an integer of at least 1"),
        ({"vocab_size": -1}, "vocab_size = -1"),
        ({"d_model": 2.5}, r"d_model = 2.5"),
        ({"num_heads": True}, "num_heads = True"),
        ({"num_heads": 5}, r"d_model = 32: must be divisible by num_heads \(5\)"),
        ({"family": "gpt3"}, r"family = 'gpt3': did you mean gpt2\? allowed are gpt2, llama"),
        ({"num_kv_heads": 2}, "num_kv_heads = 2: gpt2 is multi-head"),
        ({"head_dim": 7}, "head_dim = 7: gpt2 needs"),
        ({"family": "llama"}, "d_ff = None: a llama"),
        ({"family": "llama", "d_ff": 8, "num_kv_heads": 3}, r"num_kv_heads = 3: must divide num_heads \(4\)"),
        ({"family": "llama", "d_ff": 8, "head_dim": 7}, "head_dim = 7: rotary"),
        ({"tie_embeddings": "yes"}, "tie_embeddings = 'yes': must be true or false"),
        ({"qkv_bias": False}, "qkv_bias = False: gpt2 has biases"),
        ({"sliding_window": 0}, "sliding_window = 0: must be an integer of at least 1"),
        ({"sliding_window": 2.5}, "sliding_window = 2.5: must be an integer of at least 1"),
    ],
)
def test_models_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        model(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"seq_len": -3}, "seq_len = -3"),
        ({"attention": "flsh"}, "attention = 'flsh'"),
        ({"optimizer": "adam w"}, "optimizer = 'adam w': did you mean adamw"),
        ({"max_grad_norm": 0}, "max_grad_norm = 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm = nan"),
        ({"dropout": 1.0}, "dropout = 1.0: must be a finite number of at least 0 and below 1"),
        ({"grad_accumulation": 1.5}, "grad_accumulation = 1.5"),
    ],
)
def test_plans_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        Plan(**changes)


def test_a_sequence_longer_than_the_positions():
    with pytest.raises(ConfigError, match="seq_len = 9: the model holds 8 positions"):
        Plan(seq_len=9).tokens(model())
    assert Plan().tokens(model()) == 8


def test_a_window_as_long_as_the_context_is_none():
    assert [model(sliding_window=w).sliding_window for w in (1, 7, 8, 9, None)] == [1, 7, None, None, None]


@given(st.integers(1, 8), st.integers(1, 16), st.integers(1, 8))
def test_configurations_round_trip(heads, width, layers):
    m = model(num_heads=heads, d_model=heads * width, num_layers=layers)
    assert ModelConfig(**m.to_dict()) == m
    assert m.replace() == m
    p = Plan(batch_size=layers)
    assert Plan(**p.to_dict()) == p


def test_replace_derives_again_what_was_derived():
    wider = model().replace(d_model=64)
    assert (wider.head_dim, wider.d_ff) == (16, 256)
    assert model(d_ff=40).replace(d_model=64).d_ff == 40
    with pytest.raises(ConfigError, match="ModelConfig field = 'layers'"):
        model().replace(layers=3)


def test_auto_is_what_torch_picks():
    assert [Plan().optimizer_on(d) for d in ("cpu", "cuda")] == ["loop", "foreach"]
    assert Plan(optimizer="sgd").optimizer_on("cuda") == "bundled"


def test_choose_says_what_is_near():
    assert choose("x", "a", ("a", "b")) == "a"
    with pytest.raises(ConfigError, match=r"x = 3: allowed are a, b"):
        choose("x", 3, ("a", "b"))


def sparse(**changes):
    experts = changes.pop("experts", Experts())
    sizes = {"num_experts": 8, "experts_per_token": 2, "d_expert": 12}
    return model(**{"family": "mine", "parts": Parts(experts=experts), **sizes, **changes})


def latent(**changes):
    sizes = {"kv_rank": 6, "rope_dim": 4, "nope_dim": 8, "value_dim": 8, "d_ff": 12}
    parts = Parts(attention=Attention(latent="keys"))
    return model(**{"family": "mine", "parts": parts, **sizes, **changes})


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (model, {"family": "mine"}, "family = 'mine': allowed are gpt2, llama"),
        (model, {"parts": LLAMA, "family": 3}, "family = 3: must be a name"),
        (model, {"parts": LLAMA, "family": "mine"}, "d_ff = None: a mine has no default"),
        (model, {"parts": {"nrm": {}}}, r"Parts field = 'nrm': did you mean norm\?"),
        (model, {"parts": {"norm": {"kind": "rsm"}}}, r"Norm.kind = 'rsm': did you mean rms\?"),
        (model, {"parts": {"norm": 3}}, "Parts.norm = 3: must be Norm"),
        (model, {"parts": 3}, "parts = 3: must be Parts"),
        (model, {"num_experts": 4}, "num_experts = 4: nothing in the model's parts has this size"),
        (model, {"rotary_dim": 4}, "rotary_dim = 4: a part of each head is rotated only"),
        (model, {"attention_chunk": 4}, "attention_chunk = 4: nothing"),
        (model, {"pattern": Pattern(cycle=(Layer("window"),))}, "sliding_window = None: the parts need it"),
        (model, {"pattern": Pattern(), "sliding_window": 3}, "sliding_window = 3: nothing"),
        (model, {"pattern": Pattern(cycle=(Layer(sparse=True),))}, "parts.experts = None: the pattern has sparse"),
        (sparse, {"pattern": Pattern()}, "pattern: parts.experts are given, and none"),
        (sparse, {"d_ff": 12}, "d_ff = 12: nothing"),
        (sparse, {"d_expert": None}, "d_expert = None: the parts need it"),
        (sparse, {"d_expert": 0}, "d_expert = 0: must be an integer of at least 1"),
        (sparse, {"experts_per_token": 9}, "experts_per_token = 9: must be at most the 8"),
        (sparse, {"d_shared": 9}, "d_shared = 9: nothing"),
        (sparse, {"experts": Experts(shared="plain")}, "d_shared = None: the parts need it"),
        (sparse, {"experts": Experts(grouped=True), "expert_groups": 3, "groups_per_token": 1}, "expert_groups = 3"),
        (sparse, {"experts": Experts(grouped=True), "expert_groups": 2, "groups_per_token": 3}, "groups_per_token = 3"),
        (
            sparse,
            {"experts": Experts(grouped=True), "expert_groups": 8, "groups_per_token": 1},
            "experts_per_token = 2: must be at most the 1",
        ),
        (
            sparse,
            {"experts": Experts("sigmoid", grouped=True), "expert_groups": 8, "groups_per_token": 4},
            "expert_groups = 8: a group is judged by its two best experts; allowed is at most 4",
        ),
        (latent, {"query_rank": 3}, "query_rank = 3: nothing"),
        (latent, {"kv_rank": None}, "kv_rank = None: the parts need it"),
        (latent, {"rope_dim": 3}, "rope_dim = 3: rotary embedding turns pairs"),
        (latent, {"num_kv_heads": 2}, "num_kv_heads = 2: latent attention makes keys for every head; allowed is 4"),
        (latent, {"head_dim": 8}, "head_dim = 8: .*allowed is 12"),
    ],
)
def test_parts_and_sizes_that_do_not_belong_together(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    "part",
    [
        lambda: Norm(bias=True),
        lambda: Attention(latent="keys", fused=True),
        lambda: Attention(qk_norm_late=True),
        lambda: Attention(qk_norm_kind=Norm("layer")),
        lambda: Attention(clip=0),
        lambda: Attention(bias=1),
        lambda: Positions(extra_rows=-1),
        lambda: MLP(gated=False, fused=True),
        lambda: Pattern(cycle=()),
        lambda: Pattern(cycle=Layer()),
        lambda: Parts(attention=Attention(latent="keys"), positions=Positions("learned")),
    ],
)
def test_parts_that_cannot_be(part):
    with pytest.raises(ConfigError, match=r"allowed|must be|give"):
        part()


MODELS = [
    model(),
    model(sliding_window=3, tie_embeddings=False),
    model(family="llama", d_ff=8),
    model(family="mine", parts=Parts(ends=Ends(embedding_scale=4)), d_ff=8, rotary_dim=4, embedding_dim=16),
    sparse(),
    sparse(pattern=Pattern((Layer(),), (Layer("window", sparse=True), Layer("chunk", rotates=False))), d_ff=12,
           sliding_window=3, attention_chunk=4),
    latent(),
]  # fmt: skip


@pytest.mark.parametrize("m", MODELS, ids=str)
def test_models_of_parts_round_trip_through_json_and_can_be_keys(m):
    assert ModelConfig(**json.loads(json.dumps(m.to_dict()))) == m
    assert m.replace() == m
    assert {m: 1}[m.replace()] == 1
    assert m.replace(num_layers=1).layers == m.layers[:1]


def test_what_a_family_says_is_left_out():
    assert not {"parts", "pattern", "num_experts"} & model(tie_embeddings=False).to_dict().keys()
    assert model().parts == GPT2
    assert model(tie_embeddings=False).parts.ends == Ends(tied=False)
    assert model(family="llama", d_ff=8, qkv_bias=True).parts.attention.bias


def test_parts_say_what_is_tied_unless_the_sizes_do():
    tied = Parts(ends=Ends(tied=True), attention=Attention(bias=True))
    m = model(family="mine", parts=tied, d_ff=8)
    assert (m.tie_embeddings, m.qkv_bias) == (True, True)
    assert m.replace(tie_embeddings=False).parts == Parts(attention=Attention(bias=True))
    assert m.replace(parts=LLAMA).tie_embeddings is False


def test_layers_follow_the_pattern_and_windows_that_hold_the_context_are_full():
    pattern = Pattern((Layer(),), (Layer("window"), Layer("chunk")))
    m = model(family="mine", parts=LLAMA, num_layers=4, d_ff=8, pattern=pattern, sliding_window=3, attention_chunk=8)
    assert [x.attention for x in m.layers] == ["full", "window", "full", "window"]
    assert m.attention_chunk is None
    assert [x.rotates for x in model(num_layers=2).layers] == [False, False]
    assert [x.attention for x in model(sliding_window=3).layers] == ["window", "window"]


def test_the_shortest_pattern_of_a_list():
    a, b = Layer(), Layer("window")
    assert Pattern.of([a] * 5) == Pattern(cycle=(a,))
    assert Pattern.of([b, b, a] * 3 + [b]) == Pattern(cycle=(b, b, a))
    assert Pattern.of([a, a] + [b] * 9) == Pattern((a, a), (b,))


def test_constants_are_no_statements():
    def parts(x, scale):
        return Parts(attention=Attention(softcap=x, scale=scale), ends=Ends(embedding_scale=x))

    assert parts(2.0, None).statements() == parts(3, 0.1).statements() != parts(None, None).statements()
