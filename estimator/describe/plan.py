"""How a step is run: a `Plan`, frozen, validated, framework-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from estimator.describe import context, deepspeed, expert, megatron, pipeline, tensor, transformers
from estimator.describe.adapters import ALL, EXPERTS, saved_listed, targets_listed
from estimator.describe.bundled import known_with
from estimator.describe.checks import ConfigError, known_fields
from estimator.describe.selection import Selection, parts_listed
from estimator.describe.settings import (
    Needs,
    check_needs,
    check_values,
    choice,
    flag,
    integer,
    number,
    probability,
    settings,
    text,
)

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig

FULLY_SHARDED = ("zero2", "zero3")  # what PyTorch's fully_shard does
# The implementations of each optimizer; "auto" is the first, on CUDA foreach in place of loop: torch.optim's default
# there, but for Adafactor's, which takes lists only where it is asked to (torch.optim._adafactor.adafactor).
OPTIMIZERS = {
    "adamw": ("loop", "foreach", "fused", "bundled"),
    "adam": ("loop", "foreach", "fused"),
    "sgd": ("bundled", "loop", "foreach", "fused"),
    "sgd-momentum": ("loop", "foreach", "fused"),
    "lion": ("bundled",),
    "muon": ("loop", "foreach", "fused"),
    "adafactor": ("loop", "foreach"),
    "adamw-8bit": ("bundled",),
}
LISTS_IF_ASKED = ("adafactor",)
# What an update needs at once: an accelerator's rows are not enough.
WHOLE_MATRICES = ("muon", "adafactor")


def fused_on_cuda(*, half: bool, masked: bool) -> str:
    """Which fused kernel of attention CUDA picks: "flash" for 16-bit dtypes without a mask, else "efficient".

    `check_for_attn_mask`, `check_dtypes_low_precision` and `priority_order` in
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, where cuDNN does not come first (on Hopper and later, from
    cuDNN 9.15.1 on, unless TORCH_CUDNN_SDPA_DEPRIORITIZED is set).
    """
    return "flash" if half and not masked else "efficient"


def alignment_on_cuda(*, half: bool) -> int:
    """Of what the widths of queries and values must be a multiple for the memory-efficient kernel: 16 bytes.

    `minimum_gemm_alignment` of sdp_utils.cpp, from compute capability 8 on. Flash has its inputs padded to 8 elements.
    """
    return 8 if half else 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How one optimizer step is run. The defaults are what a bare PyTorch script does.

    `settings(Plan)` has the declarations of its fields: what each is, what it may be, what it cannot go with.

    Raises:
        ConfigError: a value is not among those allowed.
    """

    batch_size: int = integer(
        1,
        "B, sequences in one micro-batch on one accelerator.",
        label="Micro-batch",
        common=True,
    )
    seq_len: int | None = integer(
        None,
        "T, tokens in a sequence.",
        optional="the model's context length",
        label="Sequence",
        common=True,
        draws=(None, 1, 3),
    )
    precision: str = choice(
        "fp32",
        "In which dtypes parameters are kept and products are made.",
        {
            "fp32": "everything in float32",
            "tf32": "fp32 whose matrix products run in TF32: faster, the same bytes",
            "bf16": "parameters, gradients, states and activations in bfloat16",
            "bf16-mixed": "fp32 parameters, forward and loss under `torch.autocast` in bfloat16",
            "fp16-mixed": "the same in float16, with `torch.amp.GradScaler`",
            "bf16-master": "bf16 parameters, gradients and activations; the optimizer moves fp32 parameters",
            "bf16-fsdp": (
                "for zero2 and zero3: fp32 shards, which `fully_shard` gathers in bf16 "
                "(`MixedPrecisionPolicy(param_dtype=torch.bfloat16)`); bf16-mixed there is autocast over fp32 "
                "parameters, and keeps bf16 copies of them beside these"
            ),
        },
        common=True,
        needs=(
            Needs(
                "sharding",
                FULLY_SHARDED,
                "it is a policy of fully_shard, and sharding is {sharding!r}",
                values=("bf16-fsdp",),
            ),
        ),
    )
    fp32_gradients: bool = flag(
        "With bf16-master, add the gradients of the micro-batches in fp32, in buffers that stay.",
        label="Gradients in fp32",
        needs=(
            Needs("precision", ("bf16-master",), "precision {precision!r} has no master weights to add them for"),
            Needs(
                "shared_by",
                ("one accelerator", "none"),
                "sharding is {sharding!r}, which sums bf16 gradients",
                say="allowed on several accelerators is sharding none",
            ),
        ),
    )
    attention: str = choice(
        "naive",
        "How attention is computed.",
        {
            "naive": "scores, mask, softmax and product as separate operators",
            "naive-fp32": "the same, the softmax in float32",
            "sdpa": "`torch.nn.functional.scaled_dot_product_attention`, causal, by the kernel that PyTorch picks",
            "sdpa-math": "by `torch.nn.attention.SDPBackend.MATH`, which is not fused",
            "sdpa-flash": "by SDPBackend.FLASH_ATTENTION",
            "sdpa-efficient": "by SDPBackend.EFFICIENT_ATTENTION, on CUDA",
        },
        common=True,
    )
    dropout: float = probability(
        "The probability to drop an element, in training, of the embedding, of the attention's weights and of what "
        "attention and feed-forward add to the residual stream, in every family as GPT-2 does."
    )
    loss: str = choice(
        "bundled",
        "How the cross entropy of the logits is computed.",
        {
            "bundled": "the trainer's own cross entropy",
            "torch": "`torch.nn.functional.cross_entropy` of the logits as they come",
            "torch-fp32": "the same of the logits in float32",
            "chunked": (
                "the trainer's own, with the head in it: an eighth of the logits at a time, their gradients along with "
                "them"
            ),
        },
    )
    logits_to_keep: int | None = integer(
        None,
        "Of how many positions at the end of each sequence logits are computed and the loss is taken, as in "
        "fine-tuning on completions alone (transformers' `logits_to_keep`); the targets are those of these positions.",
        optional="all positions",
        draws=(None, None, 1, 2),
        needs=(
            *known_with(("tensor_parallel", (1,)), ("pipeline_parallel", (1,)), ("context_parallel", (1,))),
            Needs(
                "implementation", ("bundled", "deepspeed"), "it is not known with implementation = {implementation!r}"
            ),
        ),
    )
    checkpointing: str = choice(
        "none",
        "What is computed again in backward rather than kept.",
        {
            "none": "nothing",
            "block": "each block, under `torch.utils.checkpoint`, non-reentrant",
            "attention": "each block's attention, its norm not included",
            "selective": (
                "each block, but what its linear layers and its fused attention computed is kept "
                "(`create_selective_checkpoint_contexts` with torchtitan's list of operators; torchtitan itself keeps "
                "every second product)"
            ),
        },
        common=True,
    )
    checkpoint_every: int = integer(
        1,
        "n: of the blocks only the n-th, the 2 n-th and so on are checkpointed.",
        draws=(1, 2),
        needs=(Needs("checkpointing", ("block", "attention", "selective"), "checkpointing is {checkpointing!r}"),),
    )
    optimizer: str = choice(
        "adamw",
        "What moves the parameters.",
        {
            "adamw": "Adam with decoupled weight decay",
            "adam": "Adam",
            "sgd": "stochastic gradient descent, without momentum",
            "sgd-momentum": "with momentum",
            "lion": "one moment, the sign of the update",
            "muon": "`torch.optim.Muon` for the blocks' matrices, AdamW for all else",
            "adafactor": "`torch.optim.Adafactor`: second moments of rows and columns",
            "adamw-8bit": "a byte an element for each moment of a matrix, in blocks of 256 with a scale",
        },
        common=True,
        needs=(
            Needs(
                "shards",
                (1,),
                "it works on whole matrices, and sharding is {sharding!r}",
                values=WHOLE_MATRICES,
                say="allowed with sharding none (DDP)",
            ),
        ),
    )
    optimizer_impl: str = choice(
        "auto",
        "How the update is written.",
        {
            "auto": "what torch picks: loop on the CPU and for adafactor, else foreach; sgd and lion: bundled",
            "loop": "torch.optim's, a loop over parameters",
            "foreach": "torch.optim's, a list of parameters at a time",
            "fused": "torch.optim's, in one kernel",
            "bundled": "the trainer's own",
        },
        label="Implementation",
    )
    grad_accumulation: int = integer(
        1,
        "Micro-batches whose gradients are added before one optimizer step.",
        label="Accumulation",
        follows="global_batch_size",
        draws=(1, 2),
    )
    max_grad_norm: float | None = number(
        None,
        "Clip the gradients to this global norm before the step.",
        above=True,
        optional="no clipping",
        label="Clip to norm",
        draws=(None, 1.0),
    )
    compile: bool = flag("`torch.compile` fuses the elementwise kernels; time knows it, memory is eager's.")
    float8: str = choice(
        "none",
        "Products of the blocks' linear layers in 8 bits, by torchao; time knows it, memory stays that of 16 bits.",
        {
            "none": "in the precision's own dtype",
            "tensorwise": "a scale for each tensor",
            "rowwise": "a scale for each row",
        },
        draws=("none",),
        needs=(
            Needs(
                "compile",
                (True,),
                "compile is False, and torchao's casts are meant to be fused",
                say="allowed with compile",
            ),
            Needs(
                "product_dtype",
                ("bf16", "fp16"),
                "precision {precision!r} does not multiply in 16 bits",
                say="allowed are precisions of 16 bits",
            ),
        ),
    )
    data_parallel: int = integer(
        1,
        "Accelerators that each run this plan on their own sequences.",
        follows="count",
        draws=(1,),
    )
    sharding: str = choice(
        "none",
        "What the accelerators do not replicate.",
        {
            "none": "nothing: DistributedDataParallel",
            "zero1": "optimizer state",
            "zero2": "gradients too",
            "zero3": "parameters too",
        },
        spellings={"ddp": "none", "fsdp": "zero3"},
        common=True,
    )
    gradient_as_bucket_view: bool = flag(
        "With DDP, gradients are views of the buckets in which they are summed, and no second copy of them.",
        needs=(
            Needs(
                "shared_by",
                ("one accelerator", "none", "zero1"),
                "sharding is {sharding!r}, which has no buckets",
                say="allowed with sharding none, zero1",
            ),
        ),
    )
    trained: str = text(
        "all",
        "The parts of the model that are trained, with commas: all, blocks, embedding, attention, feed-forward, norms, "
        "head, layers:0-3 (from the first to the last of these).",
        parse=parts_listed,
        draws=("all", "blocks", "norms,head", "attention", "embedding,feed-forward"),
    )
    frozen: str = text(
        "",
        "The parts of these that are not trained after all, named alike.",
        parse=parts_listed,
        draws=("", "embedding", "norms"),
    )
    adapter: str = choice(
        "none",
        "What is trained in the model's place.",
        {
            "none": "the model itself is trained",
            "lora": "two narrow matrices in fp32 beside each of some linear layers, and nothing else, as peft does",
            "dora": "a magnitude for each of their outputs too (Liu et al. 2024)",
        },
        needs=(
            Needs("trained", ("all",), "it freezes the model", say="leave trained at 'all'"),
            Needs("frozen", ("",), "it freezes the model", say="leave frozen empty"),
            Needs(
                "precision",
                ("fp32", "tf32", "bf16", "bf16-mixed", "fp16-mixed", "bf16-fsdp"),
                "adapters are fp32 by themselves, and precision is {precision!r}",
            ),
        ),
    )
    adapter_rank: int = integer(8, "r, the width of the adapters' matrices.", draws=(1, 4))
    adapter_targets: str = text(
        ALL,
        'The layers that have an adapter, with commas: q, v, qkv, out, gate, up, down ...; or "all-linear", every '
        'linear layer but the head; and "experts", the stacked matrices of a mixture, to which the adapters\' product '
        "is added in each forward (peft's target_parameters).",
        parse=lambda _, given: targets_listed(given),
        draws=(ALL, "qkv,up"),
    )
    adapter_dropout: float = probability("The probability to drop an element of what goes into an adapter.")
    adapter_alpha: float = number(
        16.0, "What an adapter's result is multiplied with, times r; it changes no bytes.", above=True, draws=(16.0,)
    )
    modules_to_save: str = text(
        "",
        "What is trained whole beside the adapters: embedding, head, with commas. As in peft it is a copy, in the "
        "model's dtype, and the frozen original stays.",
        parse=lambda _, given: saved_listed(given),
        draws=("", "head", "embedding,head"),
        needs=(Needs("adapter", ("lora", "dora"), "it is trained beside adapters, and adapter is {adapter!r}"),),
    )
    base_precision: str = choice(
        "none",
        "How the frozen linear layers under the adapters are kept, but the head; embedding and norms are as the "
        "precision says.",
        {
            "none": "as the precision says",
            "nf4": "4 bits and a scale for 64 of them, as bitsandbytes does (QLoRA)",
            "nf4-double": "the scales in 8 bits too",
            "int8": "8 bits and a scale for each row (LLM.int8())",
        },
        needs=(
            Needs("adapter", ("lora", "dora"), "quantised weights cannot be trained, and adapter is {adapter!r}"),
            Needs("precision", ("fp32", "tf32", "bf16", "bf16-mixed", "bf16-fsdp"), "precision is {precision!r}"),
            Needs(
                "shared_by",
                ("one accelerator", "none", "zero1"),
                "fully_shard shares out no integers, and sharding is {sharding!r}",
                values=("int8",),
                say="allowed with sharding none, zero1",
            ),
        ),
    )
    reduce_dtype: str = choice(
        "fp32",
        "With bf16-fsdp, in what gradients are summed; they are kept in fp32.",
        {"fp32": "float32", "bf16": "bfloat16: half the bytes sent"},
        needs=(Needs("precision", ("bf16-fsdp",), "precision is {precision!r}"),),
    )
    autocast: bool = flag(
        "With bf16-fsdp, forward and loss run under `torch.autocast` as well, as accelerate has it.",
        needs=(Needs("precision", ("bf16-fsdp",), "precision is {precision!r}"),),
    )
    reshard_after_forward: int | bool | None = integer(
        None,
        "With zero3, among how many accelerators a block's parameters stay shared from its forward to its backward; "
        "False keeps them whole, which is zero2.",
        optional="all that share it, as does True",
        also=(True, False),
        draws=(None,),
        needs=(Needs("sharding", ("zero3",), "sharding is {sharding!r}"),),
    )
    offload: str = choice(
        "none",
        "What of the model the host keeps for the accelerator.",
        {
            "none": "nothing",
            "parameters": (
                "parameters, gradients and optimizer states, and the update runs there (fully_shard's "
                "`CPUOffloadPolicy`): only what is gathered is on the accelerator"
            ),
            "states": (
                "masters, optimizer states and gradients, and the update runs there (DeepSpeed's offload_optimizer): "
                "parameters stay on the accelerator"
            ),
        },
        draws=("none", "parameters"),
        needs=(
            Needs("implementation", ("deepspeed",), "it is DeepSpeed's", values=("states",)),
            Needs("sharding", ("zero1", "zero2"), "it is not known of ZeRO-3", values=("states",)),
            Needs("max_grad_norm", (None,), "it is not known together with clipping", values=("states",)),
            Needs("implementation", ("bundled",), "it is a policy of fully_shard", values=("parameters",)),
            Needs("sharding", FULLY_SHARDED, "it is a policy of fully_shard", values=("parameters",)),
            Needs(
                "precision",
                ("fp32", "tf32", "bf16", "bf16-mixed", "bf16-fsdp"),
                "the scaler or the masters of {precision!r} are the accelerator's",
                values=("parameters",),
            ),
            Needs("tensor_parallel", (1,), "tensor_parallel is {tensor_parallel}"),
        ),
    )
    saved_on_host: bool = flag(
        "What autograd saves in forward is copied to the host's pinned memory, weights included and each time anew, "
        "and comes back in backward (`torch.autograd.graph.save_on_cpu`); of a checkpointed block its input.",
        draws=(False,),
        needs=(
            *known_with(("sharding", ("none", "zero1")), ("tensor_parallel", (1,)), ("pipeline_parallel", (1,))),
            *known_with(("base_precision", ("none",)), ("expert_parallel", (1,)), ("context_parallel", (1,))),
            Needs("implementation", ("bundled",), "it is not known with implementation = {implementation!r}"),
        ),
    )
    shard_group: int | None = integer(
        None,
        "With zero2 and zero3, how many accelerators share what is sharded, while groups of so many replicate it "
        "(HSDP).",
        optional="all",
        draws=(None,),
        needs=(Needs("sharding", FULLY_SHARDED, "sharding is {sharding!r}"),),
    )
    tensor_parallel: int = integer(
        1,
        "Accelerators that share each block's matrices, as PyTorch's DTensor does: each has a part of the heads and of "
        "the feed-forward's columns, and all have embedding, norms and head.",
        most=10**6,
        draws=(1,),
        needs=tensor.NEEDS,
    )
    context_parallel: int = integer(
        1,
        "Accelerators that share each sequence: each has as many of its tokens in a row, and gathers keys and values "
        "of all of them in attention. They are beside those of data_parallel, and share gradients and what is sharded "
        "with these.",
        most=10**6,
        draws=(1,),
        needs=context.NEEDS,
    )
    expert_parallel: int = integer(
        1,
        "Accelerators that share each layer's experts: each has a part of them, and each token goes to those that have "
        "its experts and comes back (all-to-all). They are those of data_parallel, which see different data.",
        most=10**6,
        draws=(1,),
        needs=expert.NEEDS,
    )
    pipeline_parallel: int = integer(
        1,
        "Stages of a pipeline, each with as many of the blocks in a row, as torch.distributed.pipelining runs them. "
        "The first has the embedding as well, the last the head; the micro-batches are grad_accumulation.",
        most=10**6,
        draws=(1,),
        needs=pipeline.NEEDS,
    )
    pipeline_schedule: str = choice(
        "1f1b",
        "In which order a stage runs the micro-batches.",
        {
            "1f1b": "a backward as soon as it can, and then a forward (Narayanan et al. 2021)",
            "gpipe": "all forwards, then all backwards (Huang et al. 2019)",
        },
        needs=(Needs("is_pipeline", (True,), "pipeline_parallel is {pipeline_parallel}", say="allowed above 1"),),
    )
    virtual_stages: int = integer(
        1,
        "Parts of a pipeline's stage: with several, each accelerator has so many pieces of consecutive blocks, and the "
        "pipeline fills faster (interleaved 1F1B, Narayanan et al. 2021; PyTorch's `ScheduleInterleaved1F1B`).",
        most=10**4,
        draws=(1,),
        needs=pipeline.VIRTUAL,
    )
    sequence_parallel: bool = flag(
        "Between the shared matrices of tensor_parallel each accelerator has its part of the tokens (Korthikanti et "
        "al. 2022).",
        draws=(False,),
        needs=tensor.SEQUENCE,
    )
    vocabulary_parallel: bool = flag(
        "The accelerators of tensor_parallel share embedding and head too, by rows of the vocabulary, and take the "
        "cross entropy of the parts of the logits that each has (`loss_parallel`).",
        draws=(False,),
        needs=tensor.VOCABULARY,
    )
    implementation: str = choice(
        "bundled",
        "Whose code a step runs.",
        {
            "bundled": "PyTorch's own, as the trainer here does: exact",
            "megatron": (
                "Megatron-LM's: its fused operators, main gradients in fp32, vocabulary-parallel embedding, head and "
                "loss, with zero1 its distributed optimizer, and selective recomputation of attention's core. A model "
                "after its source and papers, not compared with a run"
            ),
            "deepspeed": (
                "DeepSpeed's ZeRO 1 to 3: parameters and gradients of 16 bits, masters and states in fp32 shared out, "
                "gradients summed in buckets. A model after its source, within a few per cent of small runs"
            ),
            "transformers": (
                "transformers' own class of the model's family, with the loss that it returns, as its Trainer, TRL and "
                f"most fine-tuning scripts run it ({transformers.VERSION}): equal to recordings of these classes"
            ),
        },
        draws=("bundled",),
        needs=(*megatron.NEEDS, *deepspeed.NEEDS, *transformers.NEEDS),
    )
    reduce_bucket_size: int = integer(
        deepspeed.BUCKET,
        "Of DeepSpeed, elements of the bucket that gradients are summed in.",
        most=10**12,
        draws=(deepspeed.BUCKET,),
        needs=deepspeed.ONLY,
    )
    max_live_parameters: int = integer(
        deepspeed.LIVE,
        "Of DeepSpeed's ZeRO-3, how many parameters are whole at once at most (stage3_max_live_parameters).",
        most=10**12,
        draws=(deepspeed.LIVE,),
        needs=deepspeed.OF_STAGE_3,
    )

    balance: float = number(
        0.0,
        "Of a model with experts, the weight of the loss that evens out how many tokens each gets (Fedus et al. 2022, "
        "equation 4); each router adds its gradient, as DeepSeek's and Megatron's do. 0 adds none.",
        draws=(0.0,),
        needs=(
            Needs(
                "precision",
                ("fp32", "tf32", "bf16", "bf16-mixed", "bf16-master", "bf16-fsdp"),
                "the GradScaler of {precision!r} scales the loss of the logits alone",
            ),
        ),
    )
    imbalance: float = number(
        1.0,
        "Of a model with experts, the rows of the most loaded expert over the mean of all. It moves the time of their "
        "products; where an accelerator holds all experts, no byte and no FLOP depends on which are chosen. With "
        "expert_parallel the figures are those of the accelerator with that expert, to which more rows come.",
        least=1,
        most=10**6,
        draws=(1.0,),
    )
    update: str = choice(
        "after",
        "When the optimizer moves the parameters.",
        {
            "after": "after backward, all parameters at once",
            "in-backward": (
                "each as soon as its gradient is there, which is then freed (`register_post_accumulate_grad_hook`), so "
                "that the gradients are never there all together"
            ),
        },
        needs=(
            Needs(
                "grad_accumulation",
                (1,),
                "each backward moves the parameters, so that nothing adds up over grad_accumulation = "
                "{grad_accumulation} micro-batches",
            ),
            Needs(
                "max_grad_norm",
                (None,),
                "the gradients' norm is known when the first of them are gone, and max_grad_norm is {max_grad_norm}",
            ),
            Needs(
                "precision",
                ("fp32", "tf32", "bf16", "bf16-mixed", "bf16-fsdp"),
                "precision {precision!r} takes all gradients at once, for its GradScaler or its masters",
            ),
            Needs(
                "shared_by",
                ("one accelerator", *FULLY_SHARDED),
                "DDP sums a bucket of gradients after their hooks have run",
                say=f"allowed on several accelerators is sharding {', '.join(FULLY_SHARDED)}",
            ),
        ),
    )

    def __post_init__(self) -> None:
        check_values(self)
        self._take_reshard()
        check_needs(self)
        if EXPERTS in self.adapter_targets.split(",") and (self.adapter == "dora" or self.adapter_dropout):
            said = f"adapter = {self.adapter!r}, adapter_dropout = {self.adapter_dropout:g}"
            raise ConfigError(f"adapter_targets = 'experts': peft knows neither DoRA nor dropout of them, and {said}")
        if "head" in self.modules_to_save.split(",") and "head" in self.adapter_targets.split(","):
            raise ConfigError(
                "modules_to_save = 'head': adapter_targets puts an adapter beside it; allowed is one of them"
            )
        own = OPTIMIZERS[self.optimizer]
        if self.optimizer_impl not in ("auto", *own):
            raise ConfigError(
                f"optimizer_impl = {self.optimizer_impl!r}: {self.optimizer} has {', '.join(own)}; or leave it at auto"
            )
        for name, whole in (("shard_group", self.copies), ("reshard_after_forward", self.shards)):
            size = getattr(self, name)
            if size is not None and (size < 2 or (self.copies > 1 and whole % size)):
                raise ConfigError(
                    f"{name} = {size}: must be at least 2 and divide the {whole} accelerators that share; "
                    "None is all of them"
                )

    def _take_reshard(self) -> None:
        """True is "by all", and False another name of zero2."""
        if self.reshard_after_forward is False and self.sharding == "zero3":
            object.__setattr__(self, "sharding", "zero2")
        if isinstance(self.reshard_after_forward, bool):
            object.__setattr__(self, "reshard_after_forward", None)

    @property
    def freezes_inputs(self) -> bool:
        """No parameter before the first block is trained, whose input then has no gradient: adapters are in blocks."""
        return self.adapter != "none" and "embedding" not in self.modules_to_save.split(",")

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

    def kept_logits(self, model: ModelConfig) -> int | None:
        """Of how many positions of a sequence logits are computed, where that is not all of them.

        Raises:
            ConfigError: more than a sequence has.
        """
        tokens = self.tokens(model)
        if self.logits_to_keep is not None and self.logits_to_keep > tokens:
            raise ConfigError(
                f"logits_to_keep = {self.logits_to_keep}: a sequence has {tokens} tokens; allowed is at most as many"
            )
        return None if self.logits_to_keep == tokens else self.logits_to_keep

    @property
    def product_dtype(self) -> str:
        """The dtype that matrix products are in, whose peak an MFU is of: "bf16" of "bf16-mixed"."""
        return self.precision.partition("-")[0]

    def optimizer_on(self, device: str) -> str:
        """The optimizer implementation on `device` ("cpu" or "cuda"), with "auto" resolved as torch.optim does."""
        if self.optimizer_impl != "auto":
            return self.optimizer_impl
        if self.offload != "none":  # the update is the host's
            device = "cpu"
        own = OPTIMIZERS[self.optimizer]
        lists = device == "cuda" and "foreach" in own and self.optimizer not in LISTS_IF_ASKED
        return "foreach" if lists and own[0] == "loop" else own[0]

    def check_model(self, model: ModelConfig) -> None:
        """Raise ConfigError if the model's parts have something that the plan's attention or loss has not."""
        self.selection.check(model)
        self.kept_logits(model)
        tensor.check_model(self, model)
        pipeline.check_model(self, model)
        context.check_model(self, model)
        expert.check_model(self, model)
        megatron.check_model(self, model)
        transformers.check_model(self, model)
        parts = model.made_of
        most = 1.0
        if model.num_experts is not None and model.experts_per_token is not None:
            most = model.num_experts / model.experts_per_token
        layers = model.rotating_pattern
        dense = not all(layer.sparse for layer in (*layers.first, *layers.cycle))
        if self.adapter != "none" and self.adapter_targets == EXPERTS and parts.experts is not None and dense:
            raise ConfigError(
                f"adapter_targets = {EXPERTS!r}: the model has layers without experts, which would have no adapter; "
                f"allowed are others beside it, such as all-linear,{EXPERTS}"
            )
        if self.balance and parts.experts is None:
            raise ConfigError(f"balance = {self.balance:g}: the model has no experts; allowed is 0")
        if self.imbalance > most:
            why = "each token goes through an expert once" if parts.experts is not None else "the model has no experts"
            raise ConfigError(f"imbalance = {self.imbalance:g}: {why}; allowed is at most {most:g}")
        if model.unfused is not None and self.attention.startswith("sdpa"):
            raise ConfigError(
                f"attention = {self.attention!r}: no fused kernel has the model's attention.{model.unfused}; allowed "
                "are naive, naive-fp32"
            )
        for name, has in (
            ("logits_softcap", parts.ends.logits_softcap is not None),
            ("head_bias", parts.ends.head_bias),
            ("head_norm", parts.ends.head_norm),
        ):
            if has and self.loss == "chunked":
                raise ConfigError(
                    f"loss = 'chunked': it has the head in it, but not the model's ends.{name}; allowed are "
                    f"{_other_losses()}"
                )
        if self.loss == "chunked" and self.adapter != "none" and "head" in self.adapter_targets.split(","):
            raise ConfigError(
                "loss = 'chunked': it has the head in it, but not the adapter that adapter_targets puts beside it; "
                f"allowed are {_other_losses()}"
            )
        if parts.ends.head_norm and self.adapter != "none" and "head" in self.adapter_targets.split(","):
            raise ConfigError(
                f"adapter_targets = {self.adapter_targets!r}: the head's rows are normalised in each step, which no "
                "adapter knows; allowed are targets without head"
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
        than queries, as in latent attention, it is math on the CPU and memory-efficient on CUDA. Of widths that this
        one does not take (`alignment_on_cuda`) it is math there.

        Raises:
            ConfigError: `attention` names a kernel that `device` has not, or has not for this dtype, for dropout or,
                where a model is given, for its parts.
        """
        half = self.product_dtype not in ("fp32", "tf32")
        if model is not None:
            self.check_model(model)
            align = alignment_on_cuda(half=half)
            aligned = not (model.e % align or model.value_e % align)
            if self.attention == "sdpa" and model.value_e != model.e:
                return "math" if device == "cpu" or not aligned else "efficient"
            if device == "cuda" and not aligned and self.attention == "sdpa" and not half:
                return "math"
            if device == "cuda" and not aligned and self.attention == "sdpa-efficient":
                raise ConfigError(
                    f"attention = 'sdpa-efficient': it takes heads whose width is a multiple of {align} in this dtype, "
                    f"the model's are {model.e} and {model.value_e} wide; allowed are naive, naive-fp32, sdpa, "
                    "sdpa-math"
                )
        if self.attention == "sdpa" and device == "cpu":
            return "math" if self.dropout else "flash"
        if self.attention == "sdpa":
            return fused_on_cuda(half=half, masked=False)
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
    def shared_by(self) -> str:
        """What several accelerators share their work by, `sharding`; or "one accelerator"."""
        return self.sharding if self.copies > 1 else "one accelerator"

    @property
    def shards(self) -> int:
        """D, how many accelerators share what is sharded; 1 where nothing is."""
        if self.copies == 1 or self.sharding == "none":
            return 1
        return self.shard_group or self.copies

    @property
    def accelerators(self) -> int:
        """How many work together."""
        return self.copies * self.tensor_parallel * self.pipeline_parallel

    @property
    def copies(self) -> int:
        """How many have gradients of the same parameters, of other sequences or of other parts of them."""
        return self.data_parallel * self.context_parallel

    @property
    def is_pipeline(self) -> bool:
        """Whether the blocks are dealt to several stages."""
        return self.pipeline_parallel > 1

    @property
    def interleaves(self) -> bool:
        """Whether stages have several parts each, as PyTorch's `ScheduleInterleaved1F1B` runs them."""
        return self.virtual_stages > 1 and self.implementation == "bundled"

    @property
    def shares_matrices(self) -> bool:
        """Whether several accelerators share each block's matrices."""
        return self.tensor_parallel > 1

    @property
    def runs_stages(self) -> bool:
        """Whether a step is a stage's schedule, of several stages or of one."""
        return self.is_pipeline or self.implementation == "megatron"

    @property
    def is_deepspeed(self) -> bool:
        """Whether several accelerators share a step as DeepSpeed does; one alone has nobody to share with."""
        return self.implementation == "deepspeed" and self.data_parallel > 1

    @property
    def replicas(self) -> int:
        """How many groups of `shards` accelerators there are."""
        return self.copies // self.shards

    def replace(self, **changes: Any) -> Plan:
        """A copy with `changes`."""
        return replace(self, **known_fields(type(self), changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain fields; `Plan(**p.to_dict()) == p`."""
        return asdict(self)


def _other_losses() -> str:
    return ", ".join(name for name in settings(Plan)["loss"].choices if name != "chunked")
