"""What is trained: a `ModelConfig`, frozen, validated, framework-free."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from estimator.describe.checks import SHOWN, ConfigError, choose, known_fields, shown
from estimator.describe.nested import part_of, plain
from estimator.describe.parts import FAMILIES, PICKS, Layer, Parts, Pattern
from estimator.describe.settings import checked, flag, part, size, text


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only Transformer: sizes and parts. Sizes are counts, letters are those of `estimator.eager.letters`.

    `settings(ModelConfig)` has the declarations of its fields: what each is and what it may be.

    Raises:
        ConfigError: a size is not a positive integer, heads do not divide, a rotary width is odd, a size that the
            parts need is missing or one that they do not have is given, ...
    """

    family: str = text(
        MISSING,
        '"gpt2" (LayerNorm with bias, learned positions, GELU, biases) or "llama" (RMSNorm, RoPE, SwiGLU); where parts '
        "are given, any name.",
    )
    num_layers: int = size(MISSING, "L, the number of blocks.", most=1_000, label="Layers")  # the deepest published
    d_model: int = size(MISSING, "d, the width of the residual stream.", label="Width")
    num_heads: int = size(MISSING, "h, query heads.", most=10_000, label="Heads")
    vocab_size: int = size(MISSING, "V, rows of the embedding.", most=10**9, label="Vocabulary")
    context_length: int = size(MISSING, "C, positions that the model holds.", most=10**9)
    num_kv_heads: int | None = size(
        None, "k, key/value heads.", most=10_000, optional="h (multi-head attention)", label="Key/value heads"
    )
    head_dim: int | None = size(
        None,
        "e, the width of one head.",
        optional="d / h, or of latent attention nope_dim + rope_dim",
        label="Head width",
    )
    d_ff: int | None = size(
        None,
        "f, the hidden width of the feed-forward.",
        most=10_000_000,
        optional="4 d for gpt2, must not be for all others, and is right where every layer has experts in its place",
        label="Feed-forward width",
    )
    tie_embeddings: bool | None = flag(
        "The head shares the embedding's matrix.",
        default=None,
        optional="the family's habit (gpt2 yes, llama no)",
        label="Head shares the embedding",
    )
    qkv_bias: bool | None = flag(
        "Biases on the q, k and v projections of a llama (Qwen2 has them); gpt2 always has.",
        default=None,
        optional="the family's habit",
        label="Biases on q, k, v",
    )
    sliding_window: int | None = size(
        None,
        "A token sees itself and the tokens before it, so many in all, in every block (4,096 in Mistral 7B v0.1) or in "
        "the window layers of the pattern.",
        most=10**9,
        optional="all before it, as does a window no shorter than the context, which becomes None",
    )
    num_experts: int | None = size(
        None, "E, experts of a sparse layer, without the shared one.", most=100_000, optional="no experts"
    )
    experts_per_token: int | None = size(
        None, "K, how many of them a token goes through.", most=100_000, optional="no experts"
    )
    d_expert: int | None = size(None, "The hidden width of one expert.", most=10_000_000, optional="no experts")
    d_shared: int | None = size(
        None, "The hidden width of the shared expert.", most=10_000_000, optional="no shared expert"
    )
    expert_groups: int | None = size(
        None, "Groups that the experts are in, where they are chosen by groups.", most=100_000, optional="no groups"
    )
    groups_per_token: int | None = size(
        None, "How many of these groups a token's experts are chosen from.", most=100_000, optional="no groups"
    )
    query_rank: int | None = size(
        None, "Width of the vector that queries are made from, in latent attention.", optional="no such vector"
    )
    kv_rank: int | None = size(
        None, "Width of the vector that keys and values are made from.", optional="no latent attention"
    )
    rope_dim: int | None = size(
        None,
        "Of a head of latent attention, the width that is rotated; its keys are one for all heads.",
        optional="no latent attention",
    )
    nope_dim: int | None = size(
        None,
        "Of a head of latent attention, the width of queries and keys that is not rotated.",
        optional="no latent attention",
    )
    value_dim: int | None = size(
        None, "Of a head of latent attention, the width of a value.", optional="no latent attention"
    )
    rotary_dim: int | None = size(None, "Of a head, the width that is rotated, from its start.", optional="all")
    embedding_dim: int | None = size(
        None,
        "The width of embedding and head, where projections lead from it to d_model and back (OPT 350M).",
        optional="d_model",
    )
    attention_chunk: int | None = size(
        None, "A token of a chunk layer sees those before it in its chunk of so many.", most=10**9, optional="no chunks"
    )
    parts: Parts | None = part("What the blocks compute.", optional="the family's")
    pattern: Pattern | None = part(
        "Which layer is of which kind.",
        optional=(
            "all alike: a window in all where there is a sliding_window, experts in all where the parts have experts"
        ),
    )

    def __post_init__(self) -> None:
        for name in ("num_layers", "d_model", "num_heads", "vocab_size", "context_length"):
            self._put(name, checked(ModelConfig, name, getattr(self, name)))
        self._take_parts()
        self._take_pattern()
        self._refuse_or_require()
        self._derive()
        self._check_attention()
        self._check_experts()
        if self.family == "gpt2":
            self._check_gpt2()

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _take_parts(self) -> None:
        """The family's parts unless others are given; what is said of ties and biases goes into them."""
        if self.parts is None:
            choose("family", self.family, FAMILIES)
            parts = FAMILIES[self.family]
        else:
            parts = part_of(Parts, self.parts, "parts")
            if not isinstance(self.family, str) or not self.family:
                raise ConfigError(f"family = {shown(self.family)}: must be a name")
        for name in ("tie_embeddings", "qkv_bias"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ConfigError(f"{name} = {shown(getattr(self, name))}: must be true or false")
        if self.tie_embeddings is not None:
            parts = replace(parts, ends=replace(parts.ends, tied=self.tie_embeddings))
        if self.qkv_bias is not None:
            parts = replace(parts, attention=replace(parts.attention, bias=self.qkv_bias))
        self._put("parts", parts)
        self._put("tie_embeddings", parts.ends.tied)
        self._put("qkv_bias", parts.attention.bias)

    def _take_pattern(self) -> None:
        """Windows and chunks that the context fits in are none."""
        if self.pattern is not None:
            self._put("pattern", part_of(Pattern, self.pattern, "pattern"))
        for name, attention in (("sliding_window", "window"), ("attention_chunk", "chunk")):
            size = getattr(self, name)
            if size is None:
                continue
            self._put(name, checked(ModelConfig, name, size))
            if size >= self.context_length:
                self._put(name, None)
                if self.pattern is not None:
                    self._put("pattern", self.pattern.with_full(attention))

    def _refuse_or_require(self) -> None:
        """Raise ConfigError unless exactly those sizes are there that the parts and the pattern need."""
        kinds, attention, experts = self.kinds, self.made_of.attention, self.made_of.experts
        sparse = [x.sparse for x in kinds]
        if any(sparse) != (experts is not None):
            raise ConfigError(
                "parts.experts = None: the pattern has sparse layers; give Experts(...)"
                if experts is None
                else "pattern: parts.experts are given, and none of its layers is sparse; give one that is"
            )
        latent, rotary = attention.latent != "none", self.made_of.positions.kind == "rotary"
        needed = {
            "num_experts": experts is not None,
            "experts_per_token": experts is not None,
            "d_expert": experts is not None,
            "d_shared": experts is not None and experts.shared != "none",
            "expert_groups": experts is not None and experts.grouped,
            "groups_per_token": experts is not None and experts.grouped,
            "query_rank": attention.latent == "keys-and-queries",
            "kv_rank": latent,
            "rope_dim": latent,
            "nope_dim": latent,
            "value_dim": latent,
            "sliding_window": any(x.attention == "window" for x in kinds),
            "attention_chunk": any(x.attention == "chunk" for x in kinds),
            "d_ff": not all(sparse),
        }
        for name, need in needed.items():
            value = getattr(self, name)
            if value is not None and not need:
                why = "nothing in the model's parts has this size"
                raise ConfigError(f"{name} = {shown(value)}: {why}; allowed is none")
            if value is not None:
                self._put(name, checked(ModelConfig, name, value))
            elif need and name == "d_ff" and self.family == "gpt2":
                self._put(name, 4 * self.d_model)
            elif need:
                why = "the parts need it"
                if name == "d_ff":
                    why = f"a {self.family[:SHOWN]} has no default feed-forward width"
                raise ConfigError(f"{name} = None: {why}; give a positive integer")
        if self.rotary_dim is not None and (latent or not rotary):
            raise ConfigError(f"rotary_dim = {shown(self.rotary_dim)}: {_NO_ROTARY}; allowed is none")

    def _derive(self) -> None:
        """The sizes that follow from others."""
        if self.num_kv_heads is None:
            self._put("num_kv_heads", self.num_heads)
        if self.head_dim is None and self.rope_dim is not None and self.nope_dim is not None:
            self._put("head_dim", self.nope_dim + self.rope_dim)
        if self.head_dim is None:
            if self.d_model % self.num_heads:
                raise ConfigError(
                    f"d_model = {self.d_model}: must be divisible by num_heads ({self.num_heads}), or give head_dim"
                )
            self._put("head_dim", self.d_model // self.num_heads)
        for name in ("num_kv_heads", "head_dim"):
            self._put(name, checked(ModelConfig, name, getattr(self, name)))
        for name, whole in (("rotary_dim", self.head_dim), ("embedding_dim", self.d_model)):
            value = getattr(self, name)
            if value is not None:
                self._put(name, checked(ModelConfig, name, value) if value != whole else None)

    def _check_attention(self) -> None:
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"num_kv_heads = {self.num_kv_heads}: must divide num_heads ({self.num_heads})")
        if self.rope_dim is not None:
            assert self.nope_dim is not None
            if self.kv_heads != self.num_heads:
                raise ConfigError(
                    f"num_kv_heads = {self.num_kv_heads}: latent attention makes keys for every head; allowed is "
                    f"{self.num_heads}"
                )
            if self.e != self.nope_dim + self.rope_dim:
                raise ConfigError(
                    f"head_dim = {self.head_dim}: a head of latent attention is nope_dim + rope_dim wide; allowed is "
                    f"{self.nope_dim + self.rope_dim}"
                )
        a = self.made_of.attention
        if a.qk_norm_late and a.qk_norm_kind.weight != "none" and not all(x.rotates for x in self.kinds):
            raise ConfigError(
                "Attention.qk_norm_late = True: layers that do not rotate would have norms that nothing goes through; "
                "allowed are norms without a weight, or layers that all rotate"
            )
        if a.experts:
            assert self.experts_per_token is not None
            if self.num_heads != self.kv_heads * self.experts_per_token:
                raise ConfigError(
                    f"num_heads = {self.num_heads}: experts of attention have num_kv_heads heads each; allowed is "
                    f"num_kv_heads x experts_per_token ({self.kv_heads * self.experts_per_token})"
                )
        if self.rotary_dim is not None and self.rotary_dim > self.e:
            raise ConfigError(f"rotary_dim = {self.rotary_dim}: must be at most head_dim ({self.head_dim})")
        if self.made_of.positions.kind == "rotary" and self.rotated % 2:
            name = "rope_dim" if self.rope_dim else "rotary_dim" if self.rotary_dim else "head_dim"
            raise ConfigError(f"{name} = {self.rotated}: rotary embedding turns pairs, so it must be even")

    def _check_experts(self) -> None:
        experts = self.made_of.experts
        if experts is None:
            return
        assert self.num_experts is not None
        assert self.experts_per_token is not None
        choosable = self.num_experts
        if self.expert_groups is not None and self.groups_per_token is not None:
            if self.num_experts % self.expert_groups:
                raise ConfigError(f"expert_groups = {self.expert_groups}: must divide num_experts ({self.num_experts})")
            if self.groups_per_token > self.expert_groups:
                raise ConfigError(
                    f"groups_per_token = {self.groups_per_token}: must be at most expert_groups ({self.expert_groups})"
                )
            if experts.score == "sigmoid" and self.num_experts < 2 * self.expert_groups:
                raise ConfigError(
                    f"expert_groups = {self.expert_groups}: a group is judged by its two best experts; allowed is at "
                    f"most {self.num_experts // 2}"
                )
            choosable = self.num_experts // self.expert_groups * self.groups_per_token
        if experts.score == "sparse-mixer" and self.experts_per_token != PICKS:
            raise ConfigError(
                f"experts_per_token = {self.experts_per_token}: a sparse mixer makes two picks; allowed is {PICKS}"
            )
        if self.experts_per_token > choosable:
            raise ConfigError(
                f"experts_per_token = {self.experts_per_token}: must be at most the {choosable} that can be chosen"
            )

    def _check_gpt2(self) -> None:
        if self.num_kv_heads != self.num_heads:
            raise ConfigError(f"num_kv_heads = {self.num_kv_heads}: gpt2 is multi-head; allowed is {self.num_heads}")
        if self.width_of_heads != self.d_model:
            raise ConfigError(f"head_dim = {self.head_dim}: gpt2 needs num_heads x head_dim = d_model ({self.d_model})")
        if not self.qkv_bias:
            raise ConfigError("qkv_bias = False: gpt2 has biases; allowed is true")

    @property
    def made_of(self) -> Parts:
        """`parts`, which are there once the model is made."""
        assert self.parts is not None
        return self.parts

    @property
    def kinds(self) -> frozenset[Layer]:
        """Every kind of layer in the pattern, also those that a model with few layers has not."""
        return self._pattern.kinds

    @property
    def _pattern(self) -> Pattern:
        if self.pattern is not None:
            return self.pattern
        attention = "full" if self.sliding_window is None else "window"
        return Pattern(cycle=(Layer(attention, sparse=self.made_of.experts is not None),))

    @property
    def rotating_pattern(self) -> Pattern:
        """The pattern of the layers; none rotates where positions are not rotary."""
        rotary, pattern = self.made_of.positions.kind == "rotary", self._pattern
        first, cycle = (
            tuple(replace(x, rotates=x.rotates and rotary) for x in kinds) for kinds in (pattern.first, pattern.cycle)
        )
        return Pattern(first, cycle)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The kind of each layer; none rotates where positions are not rotary."""
        rotary = self.made_of.positions.kind == "rotary"
        return tuple(replace(x, rotates=x.rotates and rotary) for x in self._pattern.layers(self.num_layers))

    @property
    def kv_heads(self) -> int:
        """k, key/value heads."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def e(self) -> int:
        """e, the width of one head, of queries and keys."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def value_e(self) -> int:
        """The width of one head's value: e but in latent attention."""
        return self.e if self.value_dim is None else self.value_dim

    @property
    def rotated(self) -> int:
        """The width of a head that is rotated, where positions are rotary."""
        return self.rope_dim or self.rotary_dim or self.e

    @property
    def f(self) -> int:
        """f, the hidden width of the feed-forward."""
        assert self.d_ff is not None
        return self.d_ff

    @property
    def width_of_heads(self) -> int:
        """h e, the width of all query heads together; d in most models."""
        return self.num_heads * self.e

    @property
    def unfused(self) -> str | None:
        """What attention has that no fused kernel has: "softcap" or "sinks"; None if nothing."""
        a = self.made_of.attention
        return "softcap" if a.softcap is not None else "sinks" if a.sinks else None

    @property
    def embedding_width(self) -> int:
        """The width of embedding and head: d but where projections lead to it and back."""
        return self.embedding_dim or self.d_model

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with `changes`; sizes that were derived from a changed one are derived again."""
        head_dim = self.d_model / self.num_heads if self.rope_dim is None else self.e
        derived = {
            "num_kv_heads": self.num_heads,
            "head_dim": head_dim,
            "d_ff": 4 * self.d_model if self.family == "gpt2" else None,
        }
        again = {name: None for name, default in derived.items() if getattr(self, name) == default}
        known = known_fields(type(self), changes)
        if "parts" in changes:  # which say themselves what is tied and what has a bias
            again |= {"tie_embeddings": None, "qkv_bias": None}
        elif self.family in FAMILIES and changes.get("family") in FAMILIES and self._is_family():
            again["parts"] = None
        return replace(self, **{**again, **known})

    def _is_family(self) -> bool:
        """The parts are those of the family, but for what `tie_embeddings` and `qkv_bias` say."""
        usual = FAMILIES.get(self.family)
        if usual is None:
            return False
        p = self.made_of
        return p == replace(
            usual, ends=replace(usual.ends, tied=p.ends.tied), attention=replace(usual.attention, bias=p.attention.bias)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, ready for JSON; `ModelConfig(**m.to_dict()) == m`.

        The sizes of special parts, the parts and the pattern are left out where the model has only its family's own.
        """
        plain_fields: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _ALWAYS or (value is not None and not (f.name == "parts" and self._is_family())):
                plain_fields[f.name] = plain(value)
        return plain_fields


_NO_ROTARY = "a part of each head is rotated only in rotary positions without latent attention"
_ALWAYS = tuple(f.name for f in fields(ModelConfig))[: [f.name for f in fields(ModelConfig)].index("num_experts")]
