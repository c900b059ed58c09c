"""The parts that a decoder is made of: what each block computes, free of sizes.

A `ModelConfig` is sizes (integers, each with a letter) and these parts. A part says which statements are executed, so
that two models with equal parts have the same closed forms; the sizes that a part needs (experts, ranks, a window) are
fields of the ModelConfig. `estimator.models` and `trainer.model` have one class a part, side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import ConfigError, shown
from estimator.describe.nested import check, is_part, part_of

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalization over the width.

    Attributes:
        kind: "layer" (mean and variance, one kernel) or "rms" (Zhang and Sennrich 2019, in separate operators).
        weight: "plain"; "plus-one" (1 + w scales, so that w starts at 0: Gemma, Nemotron); "none" (OLMo).
        bias: a bias is added ("layer" only).
    """

    kind: str = "rms"
    weight: str = "plain"
    bias: bool = False

    def __post_init__(self) -> None:
        check(self, kind=("layer", "rms"), weight=("plain", "plus-one", "none"))
        if self.bias and (self.kind == "rms" or self.weight == "none"):
            raise ConfigError("Norm.bias = True: an rms norm, or one without a weight, has none; allowed is false")


# How a block adds its attention A and its feed-forward M to the stream x; n are norms.
ORDERS = {
    "pre": "x += A(n1 x); x += M(n2 x)",
    "post": "x += n1 A(x); x += n2 M(x)",
    "sandwich": "x += n2 A(n1 x); x += n4 M(n3 x)",
    "post-sum": "x = n1(x + A x); x = n2(x + M x)",
    "parallel": "x + A(n x) + M(n x), one norm",
    "parallel-two": "x + A(n1 x) + M(n2 x)",
}
QK_NORMS = ("none", "head", "head-own", "width")
LATENTS = ("none", "keys", "keys-and-queries")


@dataclass(frozen=True, slots=True)
class Attention:
    """How a block looks at other tokens.

    Attributes:
        fused: q, k and v are one projection, whose result is split.
        bias: biases on q, k and v; of latent attention on the projections down to the latent vectors.
        out_bias: a bias on the output projection.
        clip: q, k and v are clamped to so much either way (None: not).
        qk_norm: a norm on queries and keys: "none"; "head" (over head_dim, one weight for all heads); "head-own" (each
            head its own); "width" (over all heads together).
        qk_norm_kind: which norm that is (Llama 4's has no weight, Gemma 3's scales by 1 + w, Phi's is a LayerNorm).
        qk_norm_late: it comes after the rotation.
        scale: what scores are multiplied with; None for 1 / sqrt(head_dim).
        softcap: c of c tanh(scores / c), which no fused kernel has; None for none (Gemma 2: 50).
        sinks: a learned score for each head beside those of the tokens, dropped after the softmax (gpt-oss).
        latent: "none"; "keys" (keys and values come from a vector of kv_rank: multi-head latent attention of
            DeepSeek-V2-Lite); "keys-and-queries" (queries from one of query_rank too: DeepSeek-V3).
        query_scaling: queries are multiplied with a factor of their position: "none"; "all" (Ministral 3); "unrotated"
            (in layers without rotation: Llama 4).
        out_norm: an rms norm over all heads together before the output projection (BitNet).
        out_gate: what attention finds is multiplied with the sigmoid of one more projection of the input, as wide as
            all heads together, before the output projection (AFMoE).
        experts: the projections of queries and to the output are experts as well, with a router of their own and one
            bias of d; a token's queries are the k heads of each of its K experts, so that h = K k; keys and values are
            one projection (JetMoe).
    """

    fused: bool = False
    bias: bool = False
    out_bias: bool = False
    clip: float | None = None
    qk_norm: str = "none"
    qk_norm_kind: Norm = Norm()
    qk_norm_late: bool = False
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    latent: str = "none"
    query_scaling: str = "none"
    out_norm: bool = False
    out_gate: bool = False
    experts: bool = False

    def __post_init__(self) -> None:
        check(self, qk_norm=QK_NORMS, latent=LATENTS, query_scaling=("none", "all", "unrotated"))
        if self.qk_norm_late and not self.qk_norm.startswith("head"):
            raise ConfigError(
                "Attention.qk_norm_late = True: what is rotated are heads; allowed with qk_norm = 'head' or 'head-own'"
            )
        if self.qk_norm == "none" and self.qk_norm_kind != Norm():
            raise ConfigError("Attention.qk_norm_kind: there is no such norm; allowed with a qk_norm is another kind")
        if self.latent != "none" and (self.fused or self.qk_norm != "none" or self.sinks or self.clip or self.out_gate):
            raise ConfigError(
                f"Attention.latent = {self.latent!r}: latent attention has its own projections and norms; allowed with "
                "it are fused = false, qk_norm = 'none', sinks = false, clip = none, out_gate = false"
            )


@dataclass(frozen=True, slots=True)
class Positions:
    """How a block knows where a token stands.

    Attributes:
        kind: "learned" (a table added to the embedding), "rotary" (Su et al. 2021), "alibi" (Press et al. 2022: a slope
            a head times the distance, added to the scores), "sinusoidal" (a fixed table added), "none".
        pairs: what is rotated together: "halves" (i and i + half) or "neighbours" (2 i and 2 i + 1).
        extra_rows: rows of the learned table beyond the context (OPT: 2).
    """

    kind: str = "rotary"
    pairs: str = "halves"
    extra_rows: int = 0

    def __post_init__(self) -> None:
        check(self, kind=("learned", "rotary", "alibi", "sinusoidal", "none"), pairs=("halves", "neighbours"))


# Activations, by the names that config.json files use.
ACTIVATIONS = {
    "silu": "x sigmoid(x), one operator",
    "gelu": "x Phi(x) with erf, one operator",
    "gelu_tanh": "its tanh approximation, one operator",
    "gelu_new": "the same approximation, written out in eight operators, as GPT-2's code in transformers has it",
    "relu": "max(x, 0)",
    "relu2": "max(x, 0) squared (Primer)",
    "xielu": "an integral of ELU with two learned scalars a layer (Apertus)",
}


@dataclass(frozen=True, slots=True)
class MLP:
    """A feed-forward network.

    Attributes:
        gated: down(f(gate x) * up x), three matrices (Shazeer 2020); else down(f(up x)), two.
        activation: f, one of `ACTIVATIONS`.
        bias: biases on all matrices.
        fused: gate and up are one matrix, whose result is split.
        down_norm: an rms norm over f before the matrix down (BitNet).
    """

    gated: bool = True
    activation: str = "silu"
    bias: bool = False
    fused: bool = False
    down_norm: bool = False

    def __post_init__(self) -> None:
        check(self, activation=tuple(ACTIVATIONS))
        if self.fused and not self.gated:
            raise ConfigError("MLP.fused = True: a plain feed-forward has one matrix up; allowed with gated = true")


PICKS = 2  # of a sparse mixer: each takes statements of its own
SCORES = {
    "softmax": "softmax over all experts in fp32, then the K greatest",
    "logits": "the K greatest logits, then a softmax of those",
    "sigmoid": "sigmoid in fp32, then the K greatest",
    "sigmoid-chosen": "the K greatest logits, then a sigmoid of those (Kolibri)",
    "sigmoid-all": "the K greatest logits put through a sigmoid, all others 0; every expert computes every token",
    "sparse-mixer": "two picks of one, each with a softmax of the logits near the greatest (Phi-3.5-MoE)",
}


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of a feed-forward: gate and up of all experts are one tensor, down another.

    Attributes:
        score: how the router turns logits into weights, one of `SCORES`.
        normalised: the chosen weights are divided by their sum.
        correction: what is added to the scores before experts are chosen, not to their weights: "none"; "buffer"
            (DeepSeek-V3); "parameter" (of the model, but no gradient moves it: ERNIE 4.5, AFMoE).
        grouped: experts are chosen within the best groups of experts only (expert_groups, groups_per_token).
        scaling: what the weights are multiplied with; None for nothing.
        router_bias: the router has a bias.
        bias: the experts have biases (gpt-oss).
        out_bias: one bias of d is added to the sum of a token's experts (JetMoe).
        out_norm: an rms norm over that sum, the shared expert's part included (A.X K1).
        activation: of the experts, one of `ACTIVATIONS` or "clamped-swiglu" (gpt-oss: (up + 1) gate sigmoid(1.702
            gate), both clamped to 7).
        shared: an expert that all tokens go through, of width d_shared: "none", "plain", or "gated" (times
            sigmoid of a learned score a token: Qwen2-MoE).
        shared_fused: its gate and up are one matrix, whose result is split (Granite).
        averaged: the mean of the chosen experts' sum and the shared one's result, in place of their sum (Cohere 2).
    """

    score: str = "softmax"
    normalised: bool = True
    correction: str = "none"
    grouped: bool = False
    scaling: float | None = None
    router_bias: bool = False
    bias: bool = False
    out_bias: bool = False
    out_norm: bool = False
    activation: str = "silu"
    shared: str = "none"
    shared_fused: bool = False
    averaged: bool = False

    def __post_init__(self) -> None:
        check(
            self,
            score=tuple(SCORES),
            correction=("none", "buffer", "parameter"),
            activation=(*(name for name in ACTIVATIONS if name != "xielu"), "clamped-swiglu"),
            shared=("none", "plain", "gated"),
        )
        for name in ("shared_fused", "averaged"):
            if getattr(self, name) and self.shared == "none":
                raise ConfigError(f"Experts.{name} = True: there is no shared expert; allowed with plain or gated")
        if self.activation not in ACTIVATIONS and self.shared != "none":
            raise ConfigError(
                f"Experts.shared = {self.shared!r}: a shared expert is an MLP, which has no {self.activation}; allowed "
                "with it is none"
            )

    @property
    def normalises(self) -> bool:
        """The weights are divided by their sum; a softmax of the chosen is that already, "sigmoid-all" is never."""
        return self.normalised and self.score in ("softmax", "sigmoid", "sigmoid-chosen")


@dataclass(frozen=True, slots=True)
class Ends:
    """What comes before the first block and after the last.

    Attributes:
        tied: the head uses the embedding's matrix.
        head_bias: the head has a bias.
        head_norm: the head's rows are divided by their lengths, anew in each step (Baichuan 2).
        embedding_norm: a norm after the embedding (BLOOM).
        embedding_scale: what the embedding is multiplied with; None for nothing (Gemma: sqrt(d)).
        final_norm: a norm before the head.
        logits_scale: what logits are multiplied with; None for nothing.
        logits_softcap: c of c tanh(logits / c); None for none (Gemma 2: 30).
    """

    tied: bool = False
    head_bias: bool = False
    embedding_norm: bool = False
    embedding_scale: float | None = None
    final_norm: bool = True
    logits_scale: float | None = None
    logits_softcap: float | None = None
    head_norm: bool = False

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class Parts:
    """All parts of a decoder.

    Attributes:
        norm: every norm of the stream.
        order: how a block is put together, one of `ORDERS`.
        residual_scale: what attention and feed-forward are multiplied with before they are added; None for nothing.
        attention, positions, mlp, ends: see each.
        experts: of the sparse layers; None where there are none.
    """

    norm: Norm = Norm()
    order: str = "pre"
    residual_scale: float | None = None
    attention: Attention = Attention()
    positions: Positions = Positions()
    mlp: MLP = MLP()
    experts: Experts | None = None
    ends: Ends = Ends()

    def __post_init__(self) -> None:
        check(self, order=tuple(ORDERS))
        if self.experts is not None:
            object.__setattr__(self, "experts", part_of(Experts, self.experts, "Parts.experts"))
        if self.attention.experts and self.experts is None:
            raise ConfigError(
                "Attention.experts = True: they go through as many experts as the feed-forward; give some"
            )
        if self.attention.qk_norm_late and self.positions.kind != "rotary":
            raise ConfigError(
                f"Attention.qk_norm_late = True: the norm comes after a rotation, and Positions.kind is "
                f"{self.positions.kind!r}; allowed with rotary"
            )
        if self.attention.latent != "none" and self.positions.kind not in ("rotary", "none"):
            raise ConfigError(
                f"Positions.kind = {self.positions.kind!r}: latent attention rotates a part of each head; allowed are "
                "rotary, none"
            )

    def statements(self) -> Parts:
        """The same with every constant 1: what is multiplied with changes no byte and no FLOP, that it is does."""

        def ones(part: Any) -> Any:
            changes: dict[str, Any] = {}
            for f in fields(part):
                value = getattr(part, f.name)
                if isinstance(value, float):
                    changes[f.name] = 1.0
                elif is_part(value):
                    changes[f.name] = ones(value)
            return replace(part, **changes)

        result: Parts = ones(self)
        # Scores are multiplied with 1 / sqrt(head_dim) where nothing else is asked for.
        return replace(result, attention=replace(result.attention, scale=None))


@dataclass(frozen=True, slots=True)
class Layer:
    """What sets one block apart from another.

    Attributes:
        attention: "full", "window" (of sliding_window tokens) or "chunk" (within chunks of attention_chunk tokens).
        rotates: positions are rotary here (SmolLM3, Llama 4 and Cohere 2 leave some layers without).
        sparse: experts in place of the feed-forward.
    """

    attention: str = "full"
    rotates: bool = True
    sparse: bool = False

    def __post_init__(self) -> None:
        check(self, attention=("full", "window", "chunk"))


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which layer is of which kind: those of `first`, then `cycle` again and again, cut off at the last.

    Attributes:
        first: the first layers (DeepSeek: the dense ones).
        cycle: what repeats after them (Gemma 3: five windows and a full one).
    """

    first: tuple[Layer, ...] = ()
    cycle: tuple[Layer, ...] = (Layer(),)

    def __post_init__(self) -> None:
        for name in ("first", "cycle"):
            layers = getattr(self, name)
            if not isinstance(layers, (tuple, list)):
                raise ConfigError(f"Pattern.{name} = {shown(layers)}: must be a tuple of Layer(...)")
            made = tuple(part_of(Layer, x, f"Pattern.{name}") for x in layers)
            object.__setattr__(self, name, made)
        if not self.cycle:
            raise ConfigError("Pattern.cycle = (): must hold a layer; give one that repeats")

    @property
    def kinds(self) -> frozenset[Layer]:
        """Every kind of layer in it, also those that a model with few layers has not."""
        return frozenset(self.first + self.cycle)

    def with_full(self, attention: str) -> Pattern:
        """The same, but layers of this attention are full."""

        def widened(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
            return tuple(replace(x, attention="full") if x.attention == attention else x for x in layers)

        return Pattern(widened(self.first), widened(self.cycle))

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Pattern:
        """The shortest pattern of exactly these layers, such as a config.json lists: a cycle, where they repeat."""
        # The shortest cycle of the last n layers, cut off anywhere, is n less their longest border; borders of all n
        # come from one pass from the last layer to the first (Knuth, Morris and Pratt 1977).
        layers = tuple(layers)
        backwards, borders = layers[::-1], [0]
        for i in range(1, len(layers)):
            border = borders[-1]
            while border and backwards[i] != backwards[border]:
                border = borders[border - 1]
            borders.append(border + (backwards[i] == backwards[border]))
        if not layers:
            raise ConfigError("layers = (): a model has at least one")
        sums = ((len(layers) - border, len(layers) - n, n - border) for n, border in enumerate(borders, 1))
        _, first, cycle = min(sums)  # first + cycle, and of equal sums the fewest before the cycle
        return cls(layers[:first], layers[first : first + cycle])

    def layers(self, count: int) -> tuple[Layer, ...]:
        """The kind of each of `count` layers."""
        rest = count - len(self.first)
        turns = -(-rest // len(self.cycle)) if rest > 0 else 0
        return (self.first + self.cycle * turns)[:count]


GPT2 = Parts(
    norm=Norm("layer", bias=True),
    attention=Attention(fused=True, bias=True, out_bias=True),
    positions=Positions("learned"),
    mlp=MLP(gated=False, activation="gelu_tanh", bias=True),
    ends=Ends(tied=True),
)
LLAMA = Parts()
# What a family's name alone stands for.
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}
