"""What a reader should know of how the figures of an estimate came about, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe import transformers
from estimator.describe.plan import FULLY_SHARDED
from estimator.describe.units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from estimator.hardware.accelerators import Accelerator
    from estimator.memory.device import Memory

SEEN = 0.05  # of what is reserved: what of it is kept free and is less is not spoken of
FULLY_SHARD = "PyTorch's fully_shard on each block and on the model, gradients scattered in every micro-batch"
SHARDING_NOTES = {
    "zero1": "ZeRO-1 is DDP with an optimizer that works on its own rows of every parameter and then gathers the rest.",
    "zero2": f"ZeRO-2 is {FULLY_SHARD}, parameters kept from forward to backward.",
    "zero3": f"ZeRO-3 is {FULLY_SHARD}, parameters gathered again for backward.",
}


def notes(m: ModelConfig, p: Plan, global_batch_size: int | None) -> Iterator[str]:
    """What the plan makes of the figures."""
    if p.compile:
        yield "The bytes are those of eager execution; compiled, fused ops save some."
    if p.float8 != "none":
        yield (
            "Products in 8 bits change the time alone: torchao keeps inputs and weights in 16 bits, and published "
            "peaks with and without it are within 1 %. The MFU stays that of the 16-bit peak."
            + (" The experts' own products stay in 16 bits." if m.num_experts is not None else "")
        )
    if p.float8 == "rowwise":
        yield (
            "Products with a scale for each row are taken to be as fast as those with one for a tensor, which alone "
            "were timed; on two published runs that was 6 and 10 % too fast."
        )
    if p.implementation == "transformers":
        picks = (
            "" if p.attention.startswith("sdpa") else f"; attention = {p.attention!r} is its eager one, it picks sdpa"
        )
        yield (
            f"These are the statements of transformers {transformers.VERSION}; other releases differ{picks}. The batch "
            "is input_ids and labels, and keys are not cached. An attention_mask with padding in it would make a mask "
            "of T x T for each sequence, which flash attention does not take."
        )
        if p.adapter != "none" and p.checkpointing != "none":
            yield (
                "With checkpoints peft makes what comes out of the embedding want a gradient "
                "(enable_input_require_grads): the backward of the first block's input, which that adds, is not in the "
                "figures."
            )
    if p.implementation == "megatron":
        yield "Megatron-LM's implementation is a model after its source and papers, not compared with a run of it."
    elif p.is_deepspeed:
        yield (
            f"DeepSpeed's implementation is a model after its source, within a few per cent of small runs; its bucket "
            f"of {p.reduce_bucket_size:,} elements takes {p.reduce_bucket_size * 2 / GIB:.2f} GiB."
        )
    elif p.shards > 1:
        yield SHARDING_NOTES[p.sharding]
    if m.num_experts is not None:
        routed = "all experts get equally many tokens" if p.imbalance == 1 else "one expert gets more than its share"
        same = "bytes and FLOPs are the same whichever experts are chosen, as each accelerator holds all of them"
        of = "The time is that" if p.expert_parallel == 1 else "Bytes and time are those"
        why = f"; {same}" if p.expert_parallel == 1 else ", of the accelerator that gets the most"
        yield f"{of} of a step in which {routed} (imbalance = {p.imbalance:g}){why}."
    if p.shards > 1 and p.sharding in FULLY_SHARDED and p.precision in ("bf16-mixed", "fp16-mixed"):
        yield (
            f"{p.precision} here is autocast under FSDP: parameters are gathered in fp32, and autocast keeps a 16-bit "
            'copy of each until backward is over. precision="bf16-fsdp" gathers them in bf16.'
        )
    if p.sharding != "none" and p.data_parallel == 1:
        yield "One accelerator has nobody to share with: sharding changes nothing."
    sequences = p.batch_size * p.grad_accumulation * p.data_parallel
    if global_batch_size is not None and global_batch_size != sequences:
        yield (
            f"{p.grad_accumulation:,} micro-batches of {p.batch_size} on {p.accelerators} make {sequences:,} sequences:"
            f" of the last ones only those that {global_batch_size:,} leave are computed, in the time of full ones."
        )


def notes_of_memory(p: Plan, held: Memory) -> Iterator[str]:
    """What the messages' bytes at the peak are of, and why the driver shows more than is needed."""
    if p.shards > 1 and p.sharding in FULLY_SHARDED and p.implementation == "bundled" and held.communication:
        whole, rest = held.messages
        gradients = f", and {rest / GIB:,.2f} GiB are gradients on their way to their shards" if rest else ""
        yield (
            f"Of communication at the peak, {whole / GIB:,.2f} GiB are parameters that are whole at that moment (those "
            f"of embedding, last norm and head among them, which no block has){gradients}."
        )
    kept = held.reserved - held.allocated
    if held.account.device == "cuda" and kept > SEEN * held.reserved:
        less = held.reserved - held.reserved_expandable
        how = f"{less / GIB:,.2f} GiB less" if less > SEEN * kept else "no less"
        yield (
            f"nvidia-smi shows more than is needed: PyTorch's allocator keeps {kept / GIB:,.2f} GiB that tensors have "
            "given back, in pieces that it cannot join, and returns what is empty before it gives up. With "
            f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True it would reserve {how}."
        )


def notes_of_host(p: Plan, nbytes: int, device: str) -> Iterator[str]:
    """What the host keeps for an accelerator, of so many bytes."""
    if p.saved_on_host and device == "cuda":
        yield (
            f"The host keeps {nbytes / GIB:,.2f} GiB of what is saved for backward, for each accelerator; pinned, each "
            "tensor takes up to the next power of two. Copies take the link's datasheet rate; kernels wait for them."
        )
    if p.offload != "none" and device == "cuda":
        yield (
            f"The host keeps {nbytes / GIB:,.2f} GiB for each accelerator ({p.offload}, gradients, and what the update "
            "takes), beside what its own system needs. It is not part of the accelerator's memory; "
            "pinned, each block takes up to the next power of two."
        )


def notes_of_stages(worst: int, stages: int) -> Iterator[str]:
    """Whose figures those of a pipeline are."""
    if stages:
        yield (
            f"Memory is that of stage {worst + 1} of {stages}, which needs the most; the figures by "
            "module are its own, and FLOPs those of all stages."
        )


def notes_of_card(a: Accelerator, dtype: str) -> Iterator[str]:
    """Which of the figures that carry the answer nobody read in a source; `dtype` is that of the products."""
    told = {"memory_bytes": "memory", "memory_bandwidth": "memory bandwidth"}
    if dtype in a.peak:
        told[f"peak.{dtype}"] = f"peak in {dtype}"
    doubtful = [name for field, name in told.items() if not a.is_verified(field)]
    if doubtful:
        yield f"Of {a.id}, these figures were recalled or derived, not read in a source: {', '.join(doubtful)}."


def notes_of_device(p: Plan, device: str) -> Iterator[str]:
    """What the device's libraries take beside what PyTorch allocates by rule (docs/accuracy.md)."""
    if device == "cpu" and (p.product_dtype not in ("fp32", "tf32") or p.optimizer == "muon"):
        yield (
            "On a processor, oneDNN's matrix products in half precision take a scratch that depends on the processor, "
            "the threads and oneDNN's version, and that no figure here has: 0 to 9 % of the peak in small steps that "
            "were measured. `trainer.measure` says how much it is on this machine."
        )
