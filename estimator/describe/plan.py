"""How a step is run: a `Plan`, frozen, validated, framework-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from estimator.describe.adapters import ADAPTERS, ALL, targets_listed
from estimator.describe.checks import NORM, ConfigError, choose, known_fields, positive_int, shown
from estimator.describe.selection import Selection, parts_listed

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig

PRECISIONS = ("fp32", "tf32", "bf16", "bf16-mixed", "fp16-mixed", "bf16-master", "bf16-fsdp")
REDUCE_DTYPES = ("fp32", "bf16")
UPDATES = ("after", "in-backward")
FULLY_SHARDED = ("zero2", "zero3")  # what PyTorch's fully_shard does
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


@dataclass(frozen=True, slots=True)
class Plan:
    """How one optimizer step is run. The defaults are what a bare PyTorch script does.

    `HELP` says of each field what it is: the command line and the page print it.

    Raises:
        ConfigError: a value is not among those allowed.
    """

    HELP: ClassVar[dict[str, str]] = {
        "batch_size": "B, sequences in one micro-batch on one accelerator.",
        "seq_len": "T, tokens a sequence; None means the model's context length.",
        "precision": (
            '"fp32"; "tf32" (fp32 whose matrix products run in TF32: faster, the same bytes); "bf16" (parameters, '
            'gradients, states and activations in bfloat16); "bf16-mixed" (fp32 parameters, forward and loss under '
            '`torch.autocast`); "fp16-mixed" (the same in float16, with `torch.amp.GradScaler`); "bf16-master" (bf16 '
            'parameters, gradients and activations; the optimizer moves an fp32 copy of the parameters); "bf16-fsdp" '
            "(fp32 shards, which `fully_shard` gathers in bf16: `MixedPrecisionPolicy(param_dtype=torch.bfloat16)`; "
            'for zero2 and zero3, where "bf16-mixed" is autocast over fp32 parameters and keeps bf16 copies of them '
            "beside these)."
        ),
        "fp32_gradients": "of bf16-master, add the gradients of the micro-batches in fp32, in buffers that stay.",
        "attention": (
            '"naive" (scores, mask, softmax and product as separate ops); "naive-fp32" (the same, the softmax in '
            'float32); "sdpa" (`torch.nn.functional.scaled_dot_product_attention`, causal, by the kernel that '
            'PyTorch picks); "sdpa-math", "sdpa-flash" or "sdpa-efficient" (by that one: '
            "`torch.nn.attention.SDPBackend`'s MATH, which is not fused, FLASH_ATTENTION and EFFICIENT_ATTENTION)."
        ),
        "dropout": (
            "the probability to drop an element, in training, of the embedding, of the attention's weights and of "
            "what attention and feed-forward add to the residual stream, in both families (as GPT-2 does)."
        ),
        "loss": (
            '"bundled" (the trainer\'s own cross entropy); "torch" (`torch.nn.functional.cross_entropy` of the '
            'logits as they come); "torch-fp32" (of the logits in float32) or "chunked" (the trainer\'s own, with '
            "the head in it: an eighth of the logits at a time, their gradients along with them)."
        ),
        "checkpointing": (
            '"none"; "block": each block under `torch.utils.checkpoint`, non-reentrant; "attention": each '
            'block\'s attention, its norm not included; "selective": each block, but what its linear layers and its '
            "fused attention computed is kept (`create_selective_checkpoint_contexts` with torchtitan's list of "
            "operators; torchtitan itself keeps every second product)."
        ),
        "checkpoint_every": "n, of the blocks only the n-th, the 2 n-th and so on are checkpointed.",
        "optimizer": (
            '"adamw", "adam", "sgd" (no momentum), "sgd-momentum", "lion", "muon" (`torch.optim.Muon` for the '
            'blocks\' matrices, AdamW for all else), "adafactor" or "adamw-8bit" (a byte an element for each '
            "moment of a matrix, in blocks of 256 with a scale)."
        ),
        "optimizer_impl": (
            '"loop" (for-loop over parameters), "foreach", "fused": torch.optim\'s (of muon\'s AdamW); '
            '"bundled": the trainer\'s own; "auto": what torch picks for the device (loop on CPU, foreach on '
            "CUDA), for sgd and lion the bundled one."
        ),
        "update": (
            '"after" backward, all parameters at once; "in-backward": each as soon as its gradient is there, which is '
            "then freed (`register_post_accumulate_grad_hook`), so that the gradients are never there all together."
        ),
        "grad_accumulation": "micro-batches whose gradients are added before one optimizer step.",
        "max_grad_norm": "clip the gradients to this global norm before the step; None means no clipping.",
        "compile": "`torch.compile` fuses the elementwise kernels; time knows it, memory is eager's.",
        "data_parallel": "accelerators that each run this plan on their own sequences.",
        "sharding": (
            'what they do not replicate: "none" (DDP), "zero1" (optimizer state), "zero2" (gradients too) or "zero3" '
            '(parameters too; "fsdp" is the same).'
        ),
        "trained": (
            "the parts of the model that are trained, with commas: all, blocks, embedding, attention, feed-forward, "
            "norms, head, layers:0-3 (from the first to the last of these)."
        ),
        "frozen": "the parts of these that are not trained after all, named alike.",
        "adapter": (
            '"lora" trains two narrow matrices beside each of some linear layers, in fp32, and nothing else, as '
            'peft does; "dora" (Liu et al. 2024) a magnitude for each output too; "none" trains the model itself.'
        ),
        "adapter_rank": "r, the width of the adapters' matrices.",
        "adapter_targets": (
            '"all-linear" (every linear layer but the head), or the layers that have an adapter, with commas: q, v, '
            "qkv, out, gate, up, down ..."
        ),
        "adapter_dropout": "the probability to drop an element of what goes into an adapter.",
        "adapter_alpha": "what an adapter's result is multiplied with, times r; of no account to bytes.",
        "reduce_dtype": '"fp32" or "bf16": of bf16-fsdp, in what gradients are summed; they are kept in fp32.',
        "autocast": "of bf16-fsdp, forward and loss run under `torch.autocast` as well, as accelerate has it.",
        "reshard_after_forward": (
            "of zero3, among how many accelerators a block's parameters stay shared from its forward to its backward; "
            "None or True for all that share it, False to keep them whole, which is zero2."
        ),
        "shard_group": (
            "of zero2 and zero3, how many accelerators share what is sharded, while groups of so many replicate it "
            "(HSDP); None for all."
        ),
    }

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
    trained: str = "all"
    frozen: str = ""
    adapter: str = "none"
    adapter_rank: int = 8
    adapter_targets: str = ALL
    adapter_dropout: float = 0.0
    adapter_alpha: float = 16.0
    reduce_dtype: str = "fp32"
    autocast: bool = False
    reshard_after_forward: int | bool | None = None
    shard_group: int | None = None
    update: str = "after"

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "batch_size", positive_int("batch_size", self.batch_size))
        put(self, "grad_accumulation", positive_int("grad_accumulation", self.grad_accumulation))
        put(self, "data_parallel", positive_int("data_parallel", self.data_parallel))
        put(self, "sharding", SHARDING_SPELLINGS.get(self.sharding, self.sharding))
        choose("sharding", self.sharding, SHARDINGS)
        for name in ("compile", "fp32_gradients", "autocast"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} = {shown(getattr(self, name))}: must be true or false")
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
        self._check_sharding()
        choose("attention", self.attention, ATTENTIONS)
        choose("loss", self.loss, LOSSES)
        rate = self.dropout
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ConfigError(f"dropout = {shown(rate)}: must be a number of at least 0 and below 1")
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
        self._check_update()
        for name in ("trained", "frozen"):
            put(self, name, parts_listed(name, getattr(self, name)))
        self._check_adapter()
        norm = self.max_grad_norm
        if norm is not None and (isinstance(norm, bool) or not isinstance(norm, (int, float)) or not 0 < norm <= NORM):
            raise ConfigError(
                f"max_grad_norm = {shown(norm)}: must be a finite number above 0 and at most {NORM:g}, or None for no "
                "clipping"
            )

    def _check_sharding(self) -> None:
        """What only `fully_shard` has."""
        put = object.__setattr__
        choose("reduce_dtype", self.reduce_dtype, REDUCE_DTYPES)
        if self.reshard_after_forward is True:
            put(self, "reshard_after_forward", None)
        elif self.reshard_after_forward is False and self.sharding == "zero3":
            put(self, "sharding", "zero2")
        if self.reshard_after_forward is False:
            put(self, "reshard_after_forward", None)
        mixed = self.precision == "bf16-fsdp"
        for name, given in (("reduce_dtype", self.reduce_dtype != "fp32"), ("autocast", self.autocast)):
            if given and not mixed:
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r}: precision is {self.precision!r}; allowed with bf16-fsdp"
                )
        if mixed and self.sharding not in FULLY_SHARDED:
            raise ConfigError(
                f"precision = 'bf16-fsdp': it is a policy of fully_shard, and sharding is {self.sharding!r}; allowed "
                "with zero2, zero3"
            )
        for name in ("shard_group", "reshard_after_forward"):
            if getattr(self, name) is None:
                continue
            put(self, name, positive_int(name, getattr(self, name)))
            allowed = FULLY_SHARDED if name == "shard_group" else ("zero3",)
            size, whole = getattr(self, name), self.data_parallel if name == "shard_group" else self.shards
            if self.sharding not in allowed:
                raise ConfigError(f"{name} = {size}: sharding is {self.sharding!r}; allowed with {', '.join(allowed)}")
            if size < 2 or (self.data_parallel > 1 and whole % size):
                raise ConfigError(
                    f"{name} = {size}: must be at least 2 and divide the {whole} accelerators that share; "
                    "None is all of them"
                )

    def _check_update(self) -> None:
        """An update in backward sees one gradient, and only once."""
        choose("update", self.update, UPDATES)
        if self.update == "after":
            return
        said = "update = 'in-backward': "
        if self.grad_accumulation > 1:
            raise ConfigError(
                f"{said}each backward moves the parameters, so that nothing adds up over grad_accumulation = "
                f"{self.grad_accumulation} micro-batches; allowed is 1"
            )
        if self.max_grad_norm is not None:
            raise ConfigError(
                f"{said}the gradients' norm is known when the first of them are gone; max_grad_norm = "
                f"{self.max_grad_norm} must be None"
            )
        if self.precision in ("fp16-mixed", "bf16-master"):
            why = {"fp16-mixed": "GradScaler looks at all gradients before any update"}
            raise ConfigError(
                f"precision = {self.precision!r}: {why.get(self.precision, 'the masters take all gradients at once')}, "
                "and update is 'in-backward'; allowed are all other precisions"
            )
        if self.data_parallel > 1 and self.sharding not in FULLY_SHARDED:
            raise ConfigError(
                f"{said}DDP sums a bucket of gradients after their hooks have run; allowed on several accelerators "
                f"is sharding {', '.join(FULLY_SHARDED)}"
            )

    def _check_adapter(self) -> None:
        choose("adapter", self.adapter, ADAPTERS)
        object.__setattr__(self, "adapter_rank", positive_int("adapter_rank", self.adapter_rank))
        object.__setattr__(self, "adapter_targets", targets_listed(self.adapter_targets))
        rate, alpha = self.adapter_dropout, self.adapter_alpha
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ConfigError(f"adapter_dropout = {shown(rate)}: must be a number of at least 0 and below 1")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= NORM:
            raise ConfigError(f"adapter_alpha = {shown(alpha)}: must be a finite number above 0")
        if self.adapter == "none":
            return
        if self.selection != Selection():
            raise ConfigError(
                f"adapter = {self.adapter!r}: it freezes the model; leave trained at 'all' and frozen empty"
            )
        if self.precision == "bf16-master":
            raise ConfigError(
                "precision = 'bf16-master': adapters are fp32 by themselves; allowed are all other precisions"
            )

    @property
    def selection(self) -> Selection:
        """Which parameters are trained."""
        return Selection.of(self.trained, self.frozen)

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

    def check_model(self, model: ModelConfig) -> None:
        """Raise ConfigError if the model's parts have something that the plan's attention or loss has not."""
        self.selection.check(model)
        parts = model.made_of
        if model.unfused is not None and self.attention.startswith("sdpa"):
            raise ConfigError(
                f"attention = {self.attention!r}: no fused kernel has the model's attention.{model.unfused}; allowed "
                "are naive, naive-fp32"
            )
        for name, has in (
            ("logits_softcap", parts.ends.logits_softcap is not None),
            ("head_bias", parts.ends.head_bias),
        ):
            if has and self.loss == "chunked":
                raise ConfigError(
                    f"loss = 'chunked': it has the head in it, but not the model's ends.{name}; allowed are "
                    f"{', '.join(x for x in LOSSES if x != 'chunked')}"
                )
        if self.loss == "chunked" and self.adapter != "none" and "head" in self.adapter_targets.split(","):
            raise ConfigError(
                "loss = 'chunked': it has the head in it, but not the adapter that adapter_targets puts beside it; "
                f"allowed are {', '.join(x for x in LOSSES if x != 'chunked')}"
            )
        if self.attention == "sdpa-flash" and model.value_e != model.e:
            raise ConfigError(
                f"attention = 'sdpa-flash': its queries and values are of one width, the model's of {model.e} and "
                f"{model.value_e}; allowed are naive, naive-fp32, sdpa, sdpa-math, sdpa-efficient"
            )

    def attention_kernel(self, device: str, model: ModelConfig | None = None) -> str:
        """What computes attention on `device`: "naive", "naive-fp32", "math", "flash" or "efficient".

        PyTorch picks flash on the CPU unless there is dropout, on CUDA for 16-bit dtypes; in fp32 CUDA's is the
        memory-efficient kernel (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). Where values have another width
        than queries, as in latent attention, it is math on the CPU and memory-efficient on CUDA.

        Raises:
            ConfigError: `attention` names a kernel that `device` has not, or has not for this dtype, for dropout or,
                where a model is given, for its parts.
        """
        half = self.product_dtype not in ("fp32", "tf32")
        if model is not None:
            self.check_model(model)
            if self.attention == "sdpa" and model.value_e != model.e:
                return "math" if device == "cpu" else "efficient"
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
        if self.data_parallel == 1 or self.sharding == "none":
            return 1
        return self.shard_group or self.data_parallel

    @property
    def replicas(self) -> int:
        """How many groups of `shards` accelerators there are."""
        return self.data_parallel // self.shards

    def replace(self, **changes: Any) -> Plan:
        """A copy with `changes`."""
        return replace(self, **known_fields(type(self), changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain fields; `Plan(**p.to_dict()) == p`."""
        return asdict(self)
