"""What is trained (`ModelConfig`) and how a step of it is run (`Plan`): frozen, validated, framework-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

FAMILIES = ("gpt2", "llama")
PRECISIONS = ("fp32", "tf32", "bf16", "bf16-mixed", "fp16-mixed", "bf16-master")
ATTENTIONS = ("naive", "naive-fp32", "sdpa", "sdpa-math", "sdpa-flash", "sdpa-efficient")
LOSSES = ("bundled", "torch", "torch-fp32", "chunked")
CHECKPOINTINGS = ("none", "block", "attention", "selective")
# The implementations of each optimizer; "auto" is the first, on CUDA foreach in place of loop.
OPTIMIZERS = {
    "adamw": ("loop", "foreach", "fused", "bundled"),
    "adam": ("loop", "foreach", "fused"),
    "sgd": ("bundled", "loop", "foreach", "fused"),
    "sgd-momentum": ("loop", "foreach", "fused"),
    "lion": ("bundled",),
    "muon": ("loop", "foreach", "fused"),
    "adafactor": ("loop",),
    "adamw-8bit": ("bundled",),
}
# What an update needs at once: an accelerator's rows are not enough.
WHOLE_MATRICES = ("muon", "adafactor", "adamw-8bit")
SHARDINGS = ("none", "zero1", "zero2", "zero3")
SHARDING_SPELLINGS = {"ddp": "none", "fsdp": "zero3"}  # PyTorch's names of the same
OPTIMIZER_IMPLS = ("auto", "loop", "foreach", "fused", "bundled")


class ConfigError(ValueError):
    """A field has a value that cannot be; the message names the field, the value and what is allowed."""


def choose(field: str, value: object, allowed: Collection[str]) -> str:
    """Return `value` if it is one of `allowed`, else raise ConfigError with the nearest names first."""
    if isinstance(value, str) and value in allowed:
        return value
    near = get_close_matches(str(value).lower(), list(allowed), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"{field} = {value!r}: {hint}allowed are {', '.join(allowed)}")


def positive_int(field: str, value: object) -> int:
    """Return `value` if it is an integer of at least 1, else raise ConfigError."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ConfigError(f"{field} = {value!r}: must be an integer of at least 1")
    return int(value.__index__())


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only Transformer. Sizes are counts, letters are those of `estimator.eager.symbols`.

    Attributes:
        family: "gpt2" (LayerNorm with bias, learned positions, GELU, biases) or "llama" (RMSNorm, RoPE, SwiGLU).
        num_layers: L, the number of blocks.
        d_model: d, the width of the residual stream.
        num_heads: h, query heads.
        vocab_size: V, rows of the embedding.
        context_length: C, positions that the model holds.
        num_kv_heads: k, key/value heads; None means h (multi-head attention).
        head_dim: e, the width of one head; None means d / h.
        d_ff: f, the hidden width of the feed-forward; None means 4 d for gpt2 and must be given for llama.
        tie_embeddings: the head shares the embedding's matrix; None means the family's habit (gpt2 yes, llama no).
        qkv_bias: biases on the q, k and v projections of a llama (Qwen2 has them); gpt2 always has.
        sliding_window: a token sees itself and the tokens before it, so many in all, in every block (4,096 in Mistral
            7B v0.1); None means all before it, as does a window no shorter than the context, which becomes None.

    Raises:
        ConfigError: a size is not a positive integer, heads do not divide, a rotary width is odd, ...
    """

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
        return replace(self, **{**again, **_known(type(self), changes)})

    def to_dict(self) -> dict[str, Any]:
        """Plain fields; `ModelConfig(**m.to_dict()) == m`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Plan:
    """How one optimizer step is run. The defaults are what a bare PyTorch script does.

    Attributes:
        batch_size: B, sequences in one micro-batch on one accelerator.
        seq_len: T, tokens a sequence; None means the model's context length.
        precision: "fp32"; "tf32" (fp32 whose matrix products run in TF32: faster, the same bytes); "bf16" (parameters,
            gradients, states and activations in bfloat16); "bf16-mixed" (fp32 parameters, forward and loss under
            `torch.autocast`); "fp16-mixed" (the same in float16, with `torch.amp.GradScaler`); "bf16-master" (bf16
            parameters, gradients and activations; the optimizer moves an fp32 copy of the parameters).
        fp32_gradients: of bf16-master, add the gradients of the micro-batches in fp32, in buffers that stay.
        attention: "naive" (scores, mask, softmax and product as separate ops); "naive-fp32" (the same, the softmax in
            float32); "sdpa" (`torch.nn.functional.scaled_dot_product_attention`, causal, by the kernel that PyTorch
            picks); "sdpa-math", "sdpa-flash" or "sdpa-efficient" (by that one: `torch.nn.attention.SDPBackend`'s MATH,
            which is not fused, FLASH_ATTENTION and EFFICIENT_ATTENTION).
        dropout: the probability to drop an element, in training, of the embedding, of the attention's weights and of
            what attention and feed-forward add to the residual stream, in both families (as GPT-2 does).
        loss: "bundled" (the trainer's own cross entropy); "torch" (`torch.nn.functional.cross_entropy` of the logits
            as they come); "torch-fp32" (of the logits in float32) or "chunked" (the trainer's own, with the head in
            it: an eighth of the logits at a time, their gradients along with them).
        checkpointing: "none"; "block": each block under `torch.utils.checkpoint`, non-reentrant; "attention": each
            block's attention, its norm not included; "selective": each block, but what its linear layers and its fused
            attention computed is kept (`create_selective_checkpoint_contexts` with torchtitan's list of operators;
            torchtitan itself keeps every second product).
        checkpoint_every: n, of the blocks only the n-th, the 2 n-th and so on are checkpointed.
        optimizer: "adamw", "adam", "sgd" (no momentum), "sgd-momentum", "lion", "muon" (`torch.optim.Muon` for the
            blocks' matrices, AdamW for all else), "adafactor" or "adamw-8bit" (a byte an element for each moment of a
            matrix, in blocks of 256 with a scale).
        optimizer_impl: "loop" (for-loop over parameters), "foreach", "fused": torch.optim's (of muon's AdamW);
            "bundled": the trainer's own; "auto": what torch picks for the device (loop on CPU, foreach on CUDA), for
            sgd and lion the bundled one.
        grad_accumulation: micro-batches whose gradients are added before one optimizer step.
        max_grad_norm: clip the gradients to this global norm before the step; None means no clipping.
        compile: `torch.compile` fuses the elementwise kernels; time knows it, memory is eager's.
        data_parallel: accelerators that each run this plan on their own sequences.
        sharding: what they do not replicate: "none" (DDP), "zero1" (optimizer state), "zero2" (gradients too) or
            "zero3" (parameters too; "fsdp" is the same).

    Raises:
        ConfigError: a value is not among those allowed.
    """

    batch_size: int = 1
    seq_len: int | None = None
    precision: str = "fp32"
    fp32_gradients: bool = False
    attention: str = "naive"
    dropout: float = 0.0
    loss: str = "bundled"
    checkpointing: str = "none"
    checkpoint_every: int = 1
    optimizer: str = "adamw"
    optimizer_impl: str = "auto"
    grad_accumulation: int = 1
    max_grad_norm: float | None = None
    compile: bool = False
    data_parallel: int = 1
    sharding: str = "none"

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "batch_size", positive_int("batch_size", self.batch_size))
        put(self, "grad_accumulation", positive_int("grad_accumulation", self.grad_accumulation))
        put(self, "data_parallel", positive_int("data_parallel", self.data_parallel))
        put(self, "sharding", SHARDING_SPELLINGS.get(self.sharding, self.sharding))
        choose("sharding", self.sharding, SHARDINGS)
        for name in ("compile", "fp32_gradients"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: must be true or false")
        if self.seq_len is not None:
            put(self, "seq_len", positive_int("seq_len", self.seq_len))
        choose("precision", self.precision, PRECISIONS)
        if self.fp32_gradients and self.precision != "bf16-master":
            raise ConfigError(
                f"fp32_gradients = True: precision {self.precision!r} has no master weights to add them for; "
                "allowed with bf16-master"
            )
        if self.fp32_gradients and self.data_parallel > 1:
            raise ConfigError(
                f"fp32_gradients = True: the data_parallel = {self.data_parallel} accelerators sum bf16 gradients; "
                "allowed on one"
            )
        choose("attention", self.attention, ATTENTIONS)
        choose("loss", self.loss, LOSSES)
        rate = self.dropout
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ConfigError(f"dropout = {rate!r}: must be a number of at least 0 and below 1")
        choose("checkpointing", self.checkpointing, CHECKPOINTINGS)
        put(self, "checkpoint_every", positive_int("checkpoint_every", self.checkpoint_every))
        if self.checkpointing == "none" and self.checkpoint_every > 1:
            raise ConfigError(
                f"checkpoint_every = {self.checkpoint_every}: checkpointing is 'none'; allowed with "
                f"{', '.join(CHECKPOINTINGS[1:])}"
            )
        choose("optimizer", self.optimizer, OPTIMIZERS)
        choose("optimizer_impl", self.optimizer_impl, OPTIMIZER_IMPLS)
        own = OPTIMIZERS[self.optimizer]
        if self.optimizer_impl not in ("auto", *own):
            raise ConfigError(
                f"optimizer_impl = {self.optimizer_impl!r}: {self.optimizer} has {', '.join(own)}; or leave it at auto"
            )
        if self.optimizer == "adamw-8bit" and self.precision == "bf16":
            raise ConfigError("precision = 'bf16': adamw-8bit moves fp32 parameters; allowed are all other precisions")
        if self.optimizer in WHOLE_MATRICES and self.shards > 1:
            raise ConfigError(
                f"sharding = {self.sharding!r}: {self.optimizer} works on whole matrices; allowed is none (DDP)"
            )
        norm = self.max_grad_norm
        if norm is not None and (isinstance(norm, bool) or not isinstance(norm, (int, float)) or not norm > 0):
            raise ConfigError(f"max_grad_norm = {norm!r}: must be a number above 0, or None for no clipping")

    def tokens(self, model: ModelConfig) -> int:
        """T, the sequence length that this plan gives to `model`.

        Raises:
            ConfigError: longer than the positions that the model holds.
        """
        if self.seq_len is None:
            return model.context_length
        if self.seq_len > model.context_length:
            raise ConfigError(
                f"seq_len = {self.seq_len}: the model holds {model.context_length} positions (context_length)"
            )
        return self.seq_len

    @property
    def product_dtype(self) -> str:
        """The dtype that matrix products are in, whose peak an MFU is of: "bf16" of "bf16-mixed"."""
        return self.precision.partition("-")[0]

    def implementation(self, device: str) -> str:
        """The optimizer implementation on `device` ("cpu" or "cuda"), with "auto" resolved as torch.optim does."""
        if self.optimizer_impl != "auto":
            return self.optimizer_impl
        own = OPTIMIZERS[self.optimizer]
        return "foreach" if device == "cuda" and "foreach" in own and own[0] == "loop" else own[0]

    def attention_kernel(self, device: str) -> str:
        """What computes attention on `device`: "naive", "naive-fp32", "math", "flash" or "efficient".

        PyTorch picks flash on the CPU unless there is dropout, on CUDA for 16-bit dtypes; in fp32 CUDA's is the
        memory-efficient kernel (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).

        Raises:
            ConfigError: `attention` names a kernel that `device` has not, or has not for this dtype or for dropout.
        """
        half = self.product_dtype not in ("fp32", "tf32")
        if self.attention == "sdpa" and device == "cpu":
            return "math" if self.dropout else "flash"
        if self.attention == "sdpa":
            return "flash" if half else "efficient"
        kernel, why = self.attention.removeprefix("sdpa-"), ""
        if (kernel, device) == ("efficient", "cpu"):
            why = "CUDA's kernel; allowed on the CPU are naive, naive-fp32, sdpa, sdpa-math, sdpa-flash"
        elif (kernel, device) == ("flash", "cpu") and self.dropout:
            why = f"the CPU's has no dropout; allowed with {self.dropout} are naive, naive-fp32, sdpa, sdpa-math"
        elif (kernel, device) == ("flash", "cuda") and not half:
            allowed = "naive, naive-fp32, sdpa, sdpa-math, sdpa-efficient"
            why = f"CUDA's is for 16-bit dtypes; allowed with precision {self.precision!r} are {allowed}"
        if why:
            raise ConfigError(f"attention = {self.attention!r}: {why}")
        return kernel

    @property
    def shards(self) -> int:
        """D, how many accelerators share what is sharded; 1 where nothing is."""
        return self.data_parallel if self.sharding != "none" else 1

    def replace(self, **changes: Any) -> Plan:
        """A copy with `changes`."""
        return replace(self, **_known(type(self), changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain fields; `Plan(**p.to_dict()) == p`."""
        return asdict(self)


def _known(cls: type, changes: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(cls)]
    for name in changes:
        choose(f"{cls.__name__} field", name, names)
    return changes
