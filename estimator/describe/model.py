"""What is trained: a `ModelConfig`, frozen, validated, framework-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from estimator.describe.checks import ConfigError, choose, known_fields, positive_int

FAMILIES = ("gpt2", "llama")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only Transformer. Sizes are counts, letters are those of `estimator.eager.symbols`.

    `HELP` says of each field what it is: the command line and the page print it.

    Raises:
        ConfigError: a size is not a positive integer, heads do not divide, a rotary width is odd, ...
    """

    HELP: ClassVar[dict[str, str]] = {
        "family": '"gpt2" (LayerNorm with bias, learned positions, GELU, biases) or "llama" (RMSNorm, RoPE, SwiGLU).',
        "num_layers": "L, the number of blocks.",
        "d_model": "d, the width of the residual stream.",
        "num_heads": "h, query heads.",
        "vocab_size": "V, rows of the embedding.",
        "context_length": "C, positions that the model holds.",
        "num_kv_heads": "k, key/value heads; None means h (multi-head attention).",
        "head_dim": "e, the width of one head; None means d / h.",
        "d_ff": "f, the hidden width of the feed-forward; None means 4 d for gpt2 and must be given for llama.",
        "tie_embeddings": "the head shares the embedding's matrix; None means the family's habit (gpt2 yes, llama no).",
        "qkv_bias": "biases on the q, k and v projections of a llama (Qwen2 has them); gpt2 always has.",
        "sliding_window": (
            "a token sees itself and the tokens before it, so many in all, in every block (4,096 in Mistral 7B "
            "v0.1); None means all before it, as does a window no shorter than the context, which becomes None."
        ),
    }

    family: str
    num_layers: int
    d_model: int
    num_heads: int
    vocab_size: int
    context_length: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    tie_embeddings: bool | None = None
    qkv_bias: bool | None = None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        choose("family", self.family, FAMILIES)
        gpt2 = self.family == "gpt2"
        for name in ("num_layers", "d_model", "num_heads", "vocab_size", "context_length"):
            put(self, name, positive_int(name, getattr(self, name)))
        if self.num_kv_heads is None:
            put(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            if self.d_model % self.num_heads:
                raise ConfigError(
                    f"d_model = {self.d_model}: must be divisible by num_heads ({self.num_heads}), or give head_dim"
                )
            put(self, "head_dim", self.d_model // self.num_heads)
        if self.d_ff is None:
            if not gpt2:
                raise ConfigError("d_ff = None: a llama has no default feed-forward width; give a positive integer")
            put(self, "d_ff", 4 * self.d_model)
        for name in ("num_kv_heads", "head_dim", "d_ff"):
            put(self, name, positive_int(name, getattr(self, name)))
        if self.sliding_window is not None:
            window = positive_int("sliding_window", self.sliding_window)
            put(self, "sliding_window", window if window < self.context_length else None)
        for name, default in (("tie_embeddings", gpt2), ("qkv_bias", gpt2)):
            value = getattr(self, name)
            if value is None:
                put(self, name, default)
            elif not isinstance(value, bool):
                raise ConfigError(f"{name} = {value!r}: must be true or false")
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"num_kv_heads = {self.num_kv_heads}: must divide num_heads ({self.num_heads})")
        if gpt2:
            if self.num_kv_heads != self.num_heads:
                raise ConfigError(
                    f"num_kv_heads = {self.num_kv_heads}: gpt2 is multi-head; allowed is {self.num_heads}"
                )
            if self.width_of_heads != self.d_model:
                raise ConfigError(
                    f"head_dim = {self.head_dim}: gpt2 needs num_heads x head_dim = d_model ({self.d_model})"
                )
            if not self.qkv_bias:
                raise ConfigError("qkv_bias = False: gpt2 has biases; allowed is true")
        elif self.e % 2:
            raise ConfigError(f"head_dim = {self.head_dim}: rotary embedding turns pairs, so it must be even")

    @property
    def kv_heads(self) -> int:
        """k, key/value heads."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def e(self) -> int:
        """e, the width of one head."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def f(self) -> int:
        """f, the hidden width of the feed-forward."""
        assert self.d_ff is not None
        return self.d_ff

    @property
    def width_of_heads(self) -> int:
        """h e, the width of all query heads together; d in most models."""
        return self.num_heads * self.e

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with `changes`; sizes that were derived from a changed one are derived again."""
        derived = {
            "num_kv_heads": self.num_heads,
            "head_dim": self.d_model / self.num_heads,
            "d_ff": 4 * self.d_model if self.family == "gpt2" else None,
        }
        again = {name: None for name, default in derived.items() if getattr(self, name) == default}
        return replace(self, **{**again, **known_fields(type(self), changes)})

    def to_dict(self) -> dict[str, Any]:
        """Plain fields; `ModelConfig(**m.to_dict()) == m`."""
        return asdict(self)
