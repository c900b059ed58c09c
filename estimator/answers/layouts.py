"""Every way to lay a run out on so many accelerators: which fit, how fast they are, and why the others are not.

A layout is tensor parallelism within a node, the stages of a pipeline, data parallelism with a sharding, the
accelerators that share the shards (HSDP), a micro-batch and what is checkpointed. One account a recipe holds for all
micro-batches and counts, so that thousands of layouts take seconds.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from estimator.accounting.accounts import account, recipe_of, sizes_for, vectorised_peak
from estimator.accounting.collector import collected_later
from estimator.answers.estimates import check_kernel
from estimator.answers.found_layouts import Layouts, Option
from estimator.answers.pipelined import figures as pipelined
from estimator.answers.pipelined import least_bytes, needed_by
from estimator.answers.plans import RECIPE
from estimator.describe.checks import ConfigError, choose
from estimator.describe.pipeline import takes
from estimator.describe.plan import FULLY_SHARDED, Plan
from estimator.describe.presets import preset
from estimator.describe.run import Run
from estimator.describe.settings import checked, choices
from estimator.describe.units import GIB, SECONDS_PER_HOUR
from estimator.hardware.accelerators import Accelerator, accelerator
from estimator.hardware.networks import network as network_of
from estimator.memory.device import needed
from estimator.pricing.money import cost
from estimator.timing.mesh import between
from estimator.timing.speed import Setup, times

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from estimator.accounting.accounts import Values
    from estimator.describe.model import ModelConfig

AXES = (
    "tensor_parallel",
    "pipeline_parallel",
    "context_parallel",
    "expert_parallel",
    "sharding",
    "shard_group",
    "batch_size",
    "checkpointing",
)  # the fields of a plan that are searched
KINDS = ("none", "selective", "block")  # of checkpointing; "attention" only where the plan has it
LAID_OUT = RECIPE.replace(max_grad_norm=None)  # what people run; clipping is not known with tensor parallelism
MEGATRON = Plan(implementation="megatron", precision="bf16-master", attention="sdpa")  # the same of Megatron-LM's runs
MOST = 16_384  # accelerators, where the smallest number is looked for


def layouts(
    model: ModelConfig | str, plan: Plan | None = None, on: Accelerator | str | Path = "h100-80gb-sxm", **how: Any
) -> pd.DataFrame:
    """Every layout that fits, the fastest first: `search(...).to_frame()`, with the same arguments."""
    return search(model, plan, on, **how).to_frame()


@collected_later()
def search(
    model: ModelConfig | str,
    plan: Plan | None = None,
    on: Accelerator | str | Path = "h100-80gb-sxm",
    *,
    count: int,
    global_batch_size: int,
    fixed: Collection[str] = (),
    network: str | float | None = None,
    price: float | None = None,
    progress: Callable[[float], object] = lambda _: None,
) -> Layouts:
    """Every layout of a run on `count` accelerators.

    Args:
        model: a configuration or the name of a preset.
        plan: how a step is run, save the searched fields (`AXES`); by default `LAID_OUT`. With tensor parallelism
            tokens are cut too and, where that can be, the vocabulary. With a precision of "bf16-mixed" or "bf16-fsdp"
            each sharding takes its own: fully_shard's policy, or autocast where parameters are whole.
        on: the accelerator, its name, or the path of a profile.
        count: accelerators; all of them work.
        global_batch_size: sequences in an optimizer step of the whole job.
        fixed: fields of `AXES` that stay as the plan has them.
        network: between nodes, as for `estimator.estimate`; by default 12.5 GB/s an accelerator, or its own if less.
        price: US dollars of an accelerator-hour; by default the median of those on file.
        progress: told how much is done, of 1; it may raise to give up.

    Raises:
        ConfigError: a name is unknown, the global batch is less than a sequence for each accelerator, the accelerators
            do not fill whole nodes, or no time can be predicted.
    """
    m = preset(model) if isinstance(model, str) else model
    a = accelerator(on)
    choose("device", a.device, ("cuda", "cpu"))
    for name in fixed:
        choose("fixed", name, AXES)
    asked = _Search(m, plan or LAID_OUT, a, Setup(network=network), frozenset(fixed), checked(Run, "count", count))
    sequences = checked(Run, "global_batch_size", global_batch_size)
    least = asked.count // max(share.together for share in asked.shares(asked.count))
    if sequences < least:
        raise ConfigError(
            f"global_batch_size = {sequences}: on {asked.count} accelerators each replica of it takes a sequence at "
            f"least; allowed is {least} or more"
        )
    check_kernel(asked.plan, a)
    refused: Counter[str] = Counter()
    found: list[Option] = []
    rate = cost(a, SECONDS_PER_HOUR, price=price).dollars
    ways = [way for way in asked.ways(refused) if way.data_parallel <= sequences]
    for i, way in enumerate(ways):
        progress(i / (len(ways) + 1))
        found += asked.fitting(way, sequences, None if rate is None else rate.median, refused)
    found.sort(key=lambda o: (o.seconds, -o.headroom))
    smallest = asked.smallest(sequences)
    most, options = -1, []
    for o in found:
        options.append(replace(o, best=o.headroom > most))
        most = max(most, o.headroom)
    given = between(a, network)
    default = network_of(network if network is not None else None)
    rate_of = f"{given / 1e9:g} GB/s an accelerator" if given is not None else f"{default.bandwidth / 1e9:g} GB/s"
    return Layouts(tuple(options), dict(refused), smallest, f"between nodes {rate_of} ({default.source})")


class Share(NamedTuple):
    """How many accelerators share a block's matrices, the blocks, a sequence; whether replicas share the experts."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    experts: bool = False

    @property
    def together(self) -> int:
        """How many work on the same sequences."""
        return self.tensor * self.pipeline * self.context


ALONE = Share()


@dataclass(frozen=True)
class _Search:
    """A question, and the layouts that answer it."""

    model: ModelConfig
    plan: Plan
    accelerator: Accelerator
    setup: Setup
    fixed: frozenset[str]
    count: int

    def ways(self, refused: Counter[str]) -> Iterator[Plan]:
        """Each sharding, group of shards and checkpointing, in micro-batches of one; why others cannot be."""
        for share in self.shares(self.count):
            for sharding in self._shardings(self.count, share):
                whole = share.tensor == share.context == 1 and not share.experts
                for group in self._groups(sharding, self.count // share.together if whole else 1):
                    for kind in self._checkpointings():
                        try:
                            yield self._way(self.count, sharding, group, kind, share)
                        except ConfigError as why:
                            refused[str(why)] += 1

    def shares(self, count: int) -> list[Share]:
        """What is tried: shares that fill the accelerators evenly, sequences and experts by themselves.

        Stages have blocks in equal numbers; only 1 where the plan or the model has what is not known together with it.
        """
        found = []
        contexts, experts = self._several("context_parallel", count), self._several("expert_parallel", count)
        for ranks in self.tensors(count):
            if "pipeline_parallel" in self.fixed:
                several = [self.plan.pipeline_parallel]
            else:
                divisors = [n for n in range(2, self.model.num_layers + 1) if self.model.num_layers % n == 0]
                several = [1, *(n for n in divisors if count % (ranks * n) == 0)]
            found += [
                share
                for stages in several
                if stages == 1 or self._known(count, Share(ranks, stages), "pipeline_parallel")
                for context in (contexts if (ranks, stages) == (1, 1) or "context_parallel" in self.fixed else [1])
                for own in (
                    experts if (ranks, stages, context) == (1, 1, 1) or "expert_parallel" in self.fixed else [1]
                )
                if (share := Share(ranks, stages, context, own > 1)) and count % share.together == 0
            ]
        return found

    def _several(self, axis: str, count: int) -> list[int]:
        """The accelerators of `axis` that are tried: all divisors of a node, or as many as there are for experts."""
        if axis in self.fixed:
            return [getattr(self.plan, axis)]
        if axis == "expert_parallel":
            several = {count: Share(experts=True)}
        else:
            node = min(count, self.accelerator.per_node)
            several = {n: Share(context=n) for n in range(2, node + 1) if count % n == 0 and node % n == 0}
        return [1, *(n for n, share in several.items() if n > 1 and self._known(count, share, axis))]

    def _known(self, count: int, share: Share, axis: str) -> bool:
        try:
            self._way(count, self._shardings(count, share)[-1], None, "none", share).check_model(self.model)
        except ConfigError:
            return axis in self.fixed  # and says why
        return True

    def tensors(self, count: int) -> list[int]:
        """The numbers of tensor-parallel ranks that are tried on so many accelerators: those that fill a node evenly.

        Only 1 where the plan or the model has something that is not known together with it.
        """
        if "tensor_parallel" in self.fixed:
            return [self.plan.tensor_parallel]
        node = self.accelerator.per_node
        found = [1]
        for ranks in range(2, min(count, node) + 1):
            if count % ranks or node % ranks:
                continue
            try:
                share = Share(ranks)
                self._way(count, self._shardings(count, share)[-1], None, "none", share).check_model(self.model)
            except ConfigError:
                continue
            found.append(ranks)
        return found

    def _shardings(self, count: int, share: Share) -> tuple[str, ...]:
        replicas, alone = count // (share.tensor * share.pipeline), share.tensor == share.context == 1
        if "sharding" in self.fixed:
            return (self.plan.sharding,)
        if replicas > 1 and self.plan.implementation == "megatron":
            return ("zero1",)
        if replicas == 1 or share.pipeline > 1:
            return ("none",)
        if share.experts:
            return ("none", *FULLY_SHARDED)
        return tuple(choices(Plan)["sharding"]) if alone else FULLY_SHARDED

    def _groups(self, sharding: str, replicas: int) -> tuple[int | None, ...]:
        if "shard_group" in self.fixed:
            return (self.plan.shard_group,)
        if sharding not in FULLY_SHARDED:
            return (None,)
        return (None, *(n for n in range(replicas // 2, 1, -1) if replicas % n == 0))

    def _checkpointings(self) -> tuple[str, ...]:
        if "checkpointing" in self.fixed:
            return (self.plan.checkpointing,)
        return (*KINDS, self.plan.checkpointing) if self.plan.checkpointing not in KINDS else KINDS

    def _way(self, count: int, sharding: str, group: int | None, checkpointing: str, share: Share = ALONE) -> Plan:
        """The plan so laid out.

        Raises:
            ConfigError: it cannot be.
        """
        checked(Plan, "checkpointing", checkpointing)
        own = self.plan.expert_parallel if "expert_parallel" in self.fixed else count // share.together
        matrices, stages, megatron = share.tensor > 1, share.pipeline, self.plan.implementation == "megatron"
        changes: dict[str, Any] = {
            "data_parallel": count // share.together,
            "tensor_parallel": share.tensor,
            "pipeline_parallel": stages,
            "context_parallel": share.context,
            "expert_parallel": own if share.experts else 1,
            "pipeline_schedule": self.plan.pipeline_schedule if stages > 1 else "1f1b",
            "virtual_stages": self.plan.virtual_stages if stages > 1 else 1,
            "sequence_parallel": matrices and megatron,
            "vocabulary_parallel": False,
            "sharding": sharding,
            "shard_group": group,
            "checkpointing": checkpointing,
            "checkpoint_every": self.plan.checkpoint_every if checkpointing == self.plan.checkpointing else 1,
            "grad_accumulation": 1,
        }
        if self.plan.precision in ("bf16-mixed", "bf16-fsdp"):
            whole = sharding not in FULLY_SHARDED or count == share.tensor * share.pipeline
            changes["precision"] = "bf16-mixed" if whole else "bf16-fsdp"
            if whole:
                changes |= {"reduce_dtype": "fp32", "autocast": False}
        if sharding != "zero3":
            changes["reshard_after_forward"] = None
        if matrices and not megatron:
            changes |= self._beside_matrices(changes)
        return self.plan.replace(**changes)

    def _beside_matrices(self, changes: dict[str, Any]) -> dict[str, bool]:
        """What goes with shared matrices, as far as it can be: tokens cut between them, embedding and head by rows.

        So torchtitan runs it; both save memory and time. With a fixed tensor_parallel it is what the plan says.
        """
        names = "sequence_parallel", "vocabulary_parallel"
        given = {name: getattr(self.plan, name) for name in names}
        ways = [given] if "tensor_parallel" in self.fixed else [dict.fromkeys(names, True), {names[0]: True}]
        for way in ways:
            try:
                self.plan.replace(**changes | way).check_model(self.model)
            except ConfigError:
                continue
            return way
        return {}

    def fitting(self, way: Plan, sequences: int, rate: float | None, refused: Counter[str]) -> list[Option]:
        """The micro-batches of `way` that fit."""
        if "batch_size" in self.fixed:
            batches = np.array([way.batch_size])
        else:  # of those that take the same number of turns the smallest: a last one that is not full takes its time
            share = -(-sequences // way.data_parallel)
            batches = np.unique([-(-share // turns) for turns in range(1, share + 1)])
        turns = -(-sequences // (batches * way.data_parallel))
        taken = [takes(way, n) for n in turns.tolist()]
        batches, turns = batches[taken], turns[taken]
        found: list[Option] = []
        if way.runs_stages and self._crowded(way, sequences):
            refused[self._too_much(way)] += len(batches)
            return found
        try:
            for points, memory, spent in self._figures(way, batches, turns):
                spare = self.accelerator.memory_bytes - memory
                for i in np.flatnonzero(spare >= 0):
                    at = points[i]
                    parts = {name: float(x[i]) for name, x in spent.items()}
                    plan = way.replace(batch_size=int(batches[at]), grad_accumulation=int(turns[at]))
                    work = float(self.flops) * sequences
                    found.append(self._option(plan, int(memory[i]), parts, work, sequences, rate))
                if len(points) > (fit := int((spare >= 0).sum())):
                    refused[self._too_much(way)] += len(points) - fit
        except ConfigError as why:
            refused[str(why)] += len(batches)
        return found

    def _too_much(self, way: Plan) -> str:
        axes = {
            "tensor parallel": way.tensor_parallel,
            "pipeline of": way.pipeline_parallel,
            "context parallel": way.context_parallel,
            "expert parallel": way.expert_parallel,
        }
        several = "".join(f"{name} {n}, " for name, n in axes.items() if n > 1)
        most = f"more than {self.accelerator.memory_bytes / GIB:.1f} GiB"
        return f"{most}: {several}{way.sharding}, checkpointing {way.checkpointing}"

    def _crowded(self, way: Plan, sequences: int) -> bool:
        """A bound says already that no micro-batch of a pipeline fits; most do not, and no step need be executed."""
        alone = self._alone(way.precision)
        itemsize = 2 if way.precision == "bf16" else 4
        return least_bytes(self.model, way, alone, itemsize, sequences) > self.accelerator.memory_bytes

    def _alone(self, precision: str) -> Values:
        """The figures of a micro-batch of one on one accelerator that has all of the model."""
        alone = self._way(1, "none", None, "none").replace(batch_size=1, precision=precision)
        return _evaluated(self.model, alone, self.accelerator.device)

    def _figures(
        self, way: Plan, batches: NDArray[np.int64], turns: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.int64], dict[str, NDArray[np.float64]]]]:
        """(points, bytes needed, seconds by part), alike points together."""
        device = self.accelerator.device
        if way.runs_stages:
            yield from pipelined(self.model, way, self.accelerator, self.setup, batches, turns)
            return
        for several in np.unique(turns > 1):
            points = np.flatnonzero((turns > 1) == several)
            plan = way.replace(grad_accumulation=2 if several else 1)
            sizes = dict(sizes_for(self.model, plan)) | {"B": batches[points]}
            for form, alike in vectorised_peak(recipe_of(self.model, plan, device), device).accounts(sizes):
                here = {**sizes, "B": batches[points][alike]}
                every = np.ones(len(alike))
                memory = np.broadcast_to(needed(form, here, self.accelerator), len(alike))
                spent = times(form, here, plan, self.accelerator, self.setup, turns[points][alike])
                yield points[alike], memory, {name: x * every for name, x in spent.items()}

    def _option(
        self, plan: Plan, memory: int, parts: Mapping[str, float], flops: float, sequences: int, rate: float | None
    ) -> Option:
        seconds = sum(parts.values())
        tokens = sequences * plan.tokens(self.model) / (seconds * self.count)
        peak = self.accelerator.peak_flops(plan.product_dtype)
        return Option(
            plan=plan,
            needed=memory,
            headroom=self.accelerator.memory_bytes - memory,
            parts=parts,
            tokens_per_second=tokens,
            mfu=flops / (seconds * peak * self.count),
            dollars=None if rate is None else rate * 1e9 / (tokens * SECONDS_PER_HOUR),
        )

    @cached_property
    def flops(self) -> int:
        """Model FLOPs of a sequence, whoever computes them."""
        v = self._alone(self._way(1, "none", None, "none").precision)
        return v.forward_flops + v.backward_flops - v.recompute_flops

    def smallest(self, sequences: int) -> int | None:
        """The least number of accelerators on which a micro-batch of one (or the fixed one) fits.

        Beyond one node it is looked for by halves: a step that fits on some nodes fits on more.
        """
        batch = self.plan.batch_size if "batch_size" in self.fixed else 1
        node = self.accelerator.per_node

        def fits(count: int) -> bool:
            return self._fits(count, batch, sequences)

        for count in range(1, node + 1):
            if fits(count):
                return count
        least, most = 1, 2
        while most * node <= MOST and not fits(most * node):
            least, most = most, 2 * most
        if most * node > MOST:
            return None
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (least, middle) if fits(middle * node) else (middle, most)
        return most * node

    def _fits(self, count: int, batch: int, sequences: int) -> bool:
        group = self.plan.shard_group if "shard_group" in self.fixed else None
        device = self.accelerator.device
        for share in self.shares(count):
            replicas = count // share.together
            if count % share.together or batch * replicas > sequences:
                continue
            turns = np.array([-(-sequences // (batch * replicas))])
            kinds = reversed(self._checkpointings())
            for kind, sharding in itertools.product(kinds, reversed(self._shardings(count, share))):
                try:
                    way = self._way(count, sharding, group, kind, share)
                    if way.runs_stages and self._crowded(way, sequences):
                        continue
                    if way.runs_stages:
                        memory = needed_by(self.model, way, self.accelerator, np.array([batch]), turns)
                        if takes(way, int(turns[0])) and memory <= self.accelerator.memory_bytes:
                            return True
                        continue
                    way = way.replace(batch_size=batch, grad_accumulation=min(int(turns[0]), 2))
                    sizes = sizes_for(self.model, way)
                    recipe = recipe_of(self.model, way, device)
                except ConfigError:
                    continue
                (form, _), *_ = vectorised_peak(recipe, device).accounts(sizes)
                if needed(form, sizes, self.accelerator)[0] <= self.accelerator.memory_bytes:
                    return True
        return False


@lru_cache(maxsize=16)
def _evaluated(m: ModelConfig, p: Plan, device: str) -> Values:
    return account(m, p, device).evaluate(m, p)
