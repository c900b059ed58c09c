"""The account of a training step: every figure as a closed form in the legend's letters, read off one ledger."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields, replace
from functools import cached_property
from threading import RLock
from typing import TYPE_CHECKING, Any

from estimator.accounting.peak import Piece, peak_pieces
from estimator.accounting.polynomials import Polynomials
from estimator.accounting.sizes import GIVEN, sizes_of
from estimator.accounting.step import run_step
from estimator.accounting.trace import Trace
from estimator.accounting.vectorised import VectorisedPeak
from estimator.describe import expert, pipeline
from estimator.describe.adapters import EXPERTS
from estimator.describe.checks import BLOCKS, ConfigError, check_figure, choose
from estimator.describe.deepspeed import SUB_GROUP
from estimator.describe.plan import FULLY_SHARDED
from estimator.describe.schedules import accumulation
from estimator.describe.selection import part_of
from estimator.describe.transformers import CLASSES
from estimator.eager.ledger import Category, Phase
from estimator.eager.letters import LETTERS, SYMBOLS, ZERO, Size, Sizes, as_sizes, expression, substituted
from estimator.eager.repetition import TURNS
from estimator.eager.sizes import ShapeClass
from estimator.models.attention import fused_kernel
from estimator.models.layers import BlockOrder, Recipe
from estimator.parallel.expert import IMBALANCE_UNIT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import sympy
    from numpy.typing import NDArray

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from estimator.eager.ledger import Where
    from estimator.eager.repetition import Stack

DEVICES = ("cpu", "cuda")
COMPONENTS = ("embedding", "attention", "feed-forward", "router", "experts", "norms", "residual", "head", "loss")
OF_EXPERTS = ("router", "experts")  # parts that a model without experts has not


def components(recipe: Recipe) -> tuple[str, ...]:
    """The parts of a model, in this order: with a router and experts of their own where it has some."""
    return tuple(name for name in COMPONENTS if name not in OF_EXPERTS or recipe.parts.experts is not None)


def component(module: str) -> str:
    """The part of the model that a module path belongs to; a shared expert is of the feed-forward."""
    named = next((name for name in module.split(".") if name in OF_EXPERTS), None)
    if named is not None:
        return named
    return "loss" if module.split(".", maxsplit=1)[0] == "loss" else part_of(module)


@dataclass(frozen=True, slots=True)
class Forms:
    """Sums over a step or a part of it, as polynomials (in an `Account`) or as integers (in `Values`).

    Attributes:
        parameters: number of parameters of the whole model, shared ones once.
        active_parameters: number of those that a token goes through: K of E experts, and all else.
        trained_parameters: number of those that are trained.
        parameter_bytes, gradient_bytes, optimizer_bytes: bytes of each that this accelerator holds, or its host for it.
        activation_bytes: bytes that autograd keeps from a micro-batch's forward for its backward; parameters, inputs
            and buffers not counted, every storage once.
        forward_flops, backward_flops: FLOPs of matrix products of a micro-batch (2 a multiply-add), those of
            recomputation in backward.
        recompute_flops: the part of backward_flops that repeats forward.
        optimizer_flops: arithmetic of an optimizer step (an operation on an element is one FLOP), clipping and the
            matrix products of Muon included.
    """

    parameters: Any
    active_parameters: Any
    trained_parameters: Any
    parameter_bytes: Any
    gradient_bytes: Any
    optimizer_bytes: Any
    activation_bytes: Any
    forward_flops: Any
    backward_flops: Any
    recompute_flops: Any
    optimizer_flops: Any


FORMS = tuple(f.name for f in fields(Forms))


@dataclass(frozen=True, slots=True)
class Values(Forms):
    """An account's figures for one model and plan, plain ints.

    Attributes:
        peak_bytes: the most bytes of live tensors at any moment of a steady step.
        peak_categories: those bytes by what they are for; their sum is peak_bytes.
        peak_where: phase, module and operator of the allocation at which they are alive.
        modules: the figures above by part of the model; each sums to the whole.
    """

    peak_bytes: int
    peak_categories: Mapping[str, int]
    peak_where: Where
    modules: Mapping[str, Forms]


_executing = RLock()  # one step at a time is executed


class _Known:
    """The accounts made so far: of one recipe, shape class and stack, one for each set of answers that its step got."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._found: OrderedDict[tuple[Any, ...], list[Account]] = OrderedDict()

    def at(self, recipe: Recipe, sizes: Mapping[str, int], device: str) -> Account:
        """The account that holds at `sizes`."""
        values = as_sizes(sizes)
        stack = recipe.layout(values["L"]).stack
        shapes = ShapeClass.at(values, recipe.halved)
        key = (recipe, shapes, device, stack)
        with _executing:
            alike = self._found.setdefault(key, [])
            self._found.move_to_end(key)
            for known in alike:
                if all(fact.answer(values) == answer for fact, answer in known.traced.ledger.facts.items()):
                    return known
            made = _account(recipe, shapes, device, stack, values)
            alike.append(made)
            while len(self._found) > self._size:
                self._found.popitem(last=False)
            return made


def _account(recipe: Recipe, shapes: ShapeClass, device: str, stack: Stack, sizes: Sizes) -> Account:
    traced = Trace(run_step(recipe, shapes, device, stack, sizes), stack)
    return Account(recipe, shapes, device, traced, *_forms(traced, recipe, shapes), peak_pieces(traced, shapes), sizes)


def _longer(recipe: Recipe, num_layers: int) -> int:
    """As many blocks, with the same number left over, as it takes for the pattern of blocks to repeat."""
    first, cycle, parts = len(recipe.order.first), recipe.order.period, recipe.local_stages
    each = num_layers // parts
    if each <= first:
        return num_layers
    return parts * max(each, first + TURNS * cycle + (each - first) % cycle)


def account(m: ModelConfig, p: Plan, device: str = "cuda", rank: int = 0) -> Account:
    """The closed forms of a step of `m` run as `p`, by the rules of PyTorch on `device` ("cpu" or "cuda").

    The result is free of sizes, save where PyTorch treats a size of 1 differently: the peak is that of the shape class
    of `m` and `p` (see `Account.peak_bytes`). Where only every n-th block is checkpointed, the forms are those of
    models whose L leaves the remainder that `m`'s leaves when divided by n; `evaluate` and `lambdify` mind that.

    Args:
        m: the model.
        p: how it is trained.
        device: whose rules.
        rank: of which of the p.copies accelerators; the first holds the most, later ones may have fewer rows.
            Of a pipeline, which stage; of those that share its parameters the second is stage + pipeline_parallel, and
            so on.

    Raises:
        ConfigError: an unknown device, a rank that there is not, or a sequence longer than the model's positions.
    """
    choose("device", device, DEVICES)
    if not p.is_pipeline:
        return account_at(recipe_of(m, p, device, rank), sizes_for(m, p, threads=1), device)
    return stage_account(m, p, device, rank).of_stage(rank)


def stage_account(m: ModelConfig, p: Plan, device: str, stage: int) -> Account:
    """The account of a stage of a pipeline, the same for all that are alike: at `sizes_for(m, p, stage=stage)`."""
    return account_at(recipe_of(m, p, device, stage), sizes_for(m, p, threads=1, stage=stage), device)


def sizes_for(m: ModelConfig, p: Plan, threads: int | None = None, stage: int = 0) -> Sizes:
    """The number behind each letter of the legend for `m` run as `p`; of a pipeline those of an `account`'s rank."""
    stage %= p.pipeline_parallel
    order = BlockOrder(m.rotating_pattern, p.checkpointing, p.checkpoint_every, p.selection, p.freezes_inputs)
    parts = p.virtual_stages if p.interleaves else 1
    layout = order.layout(m.num_layers // (p.pipeline_parallel * parts)).times(parts)
    return Sizes(_sizes(m, p, threads, stage) | layout.values)


def _sizes(m: ModelConfig, p: Plan, threads: int | None, stage: int = 0) -> Sizes:
    """Those of the model and the plan, without the turns of its groups of blocks."""
    sizes = sizes_of(m, p.batch_size, p.tokens(m), threads, p.shards)
    sizes = sizes if p.adapter == "none" else Sizes(sizes | {"r": p.adapter_rank})
    kept = p.kept_logits(m)
    sizes = sizes if kept is None else Sizes(sizes | {"T_l": kept})
    sizes = Sizes(sizes | {"L": m.num_layers // p.pipeline_parallel})  # of a stage
    if p.is_pipeline:
        sizes = Sizes(sizes | {"M": p.grad_accumulation, "w": pipeline.in_flight(p, stage)})
    if p.implementation == "megatron" and p.sharding == "zero1":
        sizes = Sizes(sizes | {"D": p.data_parallel})
    if p.is_deepspeed:
        sizes = Sizes(sizes | {"b_r": p.reduce_bucket_size, "b_l": p.max_live_parameters, "b_s": SUB_GROUP})
    for name, ranks in (("t", p.tensor_parallel), ("c", p.context_parallel), ("x", p.expert_parallel)):
        if ranks > 1:
            sizes = Sizes(sizes | {name: ranks})
    if p.expert_parallel > 1 and p.imbalance > 1:
        sizes = Sizes(sizes | {"i": round(p.imbalance * IMBALANCE_UNIT)})
    return sizes


def recipe_of(m: ModelConfig, p: Plan, device: str, rank: int = 0) -> Recipe:
    """What of `m` and `p` decides which statements a step executes on `device`, the accelerator number `rank`."""
    tokens = p.tokens(m)
    pipeline.check_plan(p)
    expert.check_plan(p)
    # Those of a tensor-parallel group are alike, and all replicas of a stage.
    ranks = p.pipeline_parallel * p.shards if p.is_pipeline else p.copies
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank = {rank}: there are {ranks}; allowed are 0 to {ranks - 1}")
    if p.precision == "bf16-fsdp" and p.copies == 1:
        raise ConfigError(
            "precision = 'bf16-fsdp': data_parallel is 1, and one accelerator shares with nobody; allowed are all "
            "other precisions"
        )
    if p.offload != "none" and p.copies == 1:
        raise ConfigError(
            f"offload = {p.offload!r}: data_parallel is 1, and it is known of several accelerators; allowed is none"
        )
    written = CLASSES.get(m.family) if p.implementation == "transformers" else None
    undropped = written is not None and written.undropped == m.made_of.positions.kind
    recipe = Recipe(
        parts=m.made_of.statements(),
        pattern=m.rotating_pattern,
        letters=tuple(_sizes(m, p, threads=1)),
        partial=m.rotary_dim is not None,
        projects=m.embedding_dim is not None,
        precision=p.precision,
        fp32_gradients=p.fp32_gradients,
        attention=(p.replace(dropout=0.0) if undropped else p).attention_kernel(device, m),
        dropout=p.dropout > 0,
        keeps_last=p.kept_logits(m) is not None,
        loss=p.loss,
        checkpointing=p.checkpointing,
        checkpoint_every=p.checkpoint_every,
        optimizer=p.optimizer,
        optimizer_impl=p.optimizer_on(device),
        clips=p.max_grad_norm is not None,
        # The second micro-batch adds to gradients that exist, and so do all after it; where gradients become views of
        # buckets, the last is another than those between.
        schedule=(
            pipeline.executed(p, rank % p.pipeline_parallel)
            if p.is_pipeline
            else accumulation(min(p.grad_accumulation, 3 if _has_bucket_views(p) else 2))
        ),
        parallel=_parallel(p),
        selection=p.selection,
        adapter=p.adapter,
        adapter_targets=p.adapter_targets if p.adapter != "none" else "",
        adapter_dropout=p.adapter != "none" and p.adapter_dropout > 0,
        adapter_scales=p.adapter_alpha != p.adapter_rank or EXPERTS not in p.adapter_targets.split(","),
        base_precision=p.base_precision,
        modules_to_save=p.modules_to_save,
        balances=p.balance > 0,
        reduce_dtype=p.reduce_dtype,
        autocast=p.autocast,
        replicated=p.replicas > 1 and p.sharding in FULLY_SHARDED,
        reshard=None if p.reshard_after_forward in (None, p.shards) else int(p.reshard_after_forward),
        offload=p.offload != "none",
        saved_on_host=p.saved_on_host,
        bucket_view=_has_bucket_views(p),
        in_backward=p.update == "in-backward",
        rank=(rank // p.pipeline_parallel if p.is_pipeline else rank) % p.shards,
        context_parallel=p.context_parallel > 1,
        imbalanced=p.expert_parallel > 1 and p.imbalance > 1,
        expert_rank=rank % p.expert_parallel,
        expert_parallel=p.expert_parallel > 1,
        tensor_parallel=p.tensor_parallel > 1,
        pipeline=p.pipeline_schedule if p.is_pipeline else "",
        stage=_stage(p, rank),
        megatron=p.implementation == "megatron",
        written=written,
        sequence_parallel=p.sequence_parallel,
        vocabulary_parallel=p.vocabulary_parallel,
        virtual_stages=p.virtual_stages,
        moves=pipeline.executed_parts(p, rank % p.pipeline_parallel),
    )
    window = m.sliding_window is not None and tokens > m.sliding_window
    why = f"a sliding_window of {m.sliding_window}" if window else f"a context_parallel of {p.context_parallel}"
    masked = window or p.context_parallel > 1
    if p.attention == "sdpa-flash" and fused_kernel("flash", device, masked=masked) != "flash":
        raise ConfigError(
            f"attention = 'sdpa-flash': CUDA's takes no mask, which {why} is at {tokens} tokens; "
            "allowed are naive, naive-fp32, sdpa, sdpa-math, sdpa-efficient"
        )
    return recipe


def _stage(p: Plan, stage: int) -> tuple[int, int]:
    """`Recipe.stage`: all stages between the first and the last are alike."""
    if not p.is_pipeline:
        return 0, 1
    stage %= p.pipeline_parallel
    return min(stage, 1), 3 if 0 < stage < p.pipeline_parallel - 1 else 2


def _parallel(p: Plan) -> str:
    """The key of `REPLICAS`."""
    if p.copies == 1:
        return "alone"
    if p.is_deepspeed:
        return f"deepspeed-{p.sharding}{'-offload' if p.offload != 'none' else ''}"
    if p.sharding != "none":
        return p.sharding
    return "ddp-fp32" if p.fp32_gradients else "ddp"


def _has_bucket_views(p: Plan) -> bool:
    return p.gradient_as_bucket_view and p.copies > 1


def account_at(recipe: Recipe, sizes: Mapping[str, int], device: str) -> Account:
    """The account that holds at `sizes`, made at most once."""
    return _known.at(recipe, sizes, device)


_RESIDENT = {
    Category.PARAMETER: "parameter_bytes",
    Category.GRADIENT: "gradient_bytes",
    Category.OPTIMIZER: "optimizer_bytes",
}


def _active(where: Where, elements: Size, recipe: Recipe, shapes: ShapeClass) -> Size:
    """The elements of a parameter that a token goes through: of a tensor of E experts those of K."""
    if recipe.parts.experts is None or component(where.module) == "router":
        return elements
    # Experts of attention have k heads each, which are h together.
    return substituted(elements, {"E": shapes.letters["g" if recipe.parts.attention.experts else "K"]})


def _forms(traced: Trace, recipe: Recipe, shapes: ShapeClass) -> tuple[Forms, dict[str, Forms]]:
    """(the whole, by component): every sum is over the ledger's entries of a component."""
    entries: dict[tuple[str, str], list[tuple[int | None, Size]]] = {}

    def enter(form: str, where: Where, size: Size) -> None:
        entries.setdefault((form, component(where.module)), []).append((where.block, size))

    ledger = traced.ledger
    for event in (*ledger.events, *ledger.host_events):
        storage = event.storage
        # A gradient that is gone when backward is over was never held, nor a weight that has been quantised.
        gone = event.where.phase is Phase.BACKWARD and storage.category is Category.GRADIENT
        gone |= event.where.phase is Phase.SETUP and storage.category is Category.PARAMETER
        if storage.category in _RESIDENT and (event.sign > 0 or gone):
            for where, nbytes in ledger.gradients.get(storage, [(storage.where, storage.nbytes)]):
                enter(_RESIDENT[storage.category], where, event.sign * nbytes)
    for where, elements in ledger.parameters:
        enter("parameters", where, elements)
        enter("active_parameters", where, _active(where, elements, recipe, shapes))
    for where, elements in ledger.trained:
        enter("trained_parameters", where, elements)
    for storage in ledger.saved:
        enter("activation_bytes", storage.where, storage.nbytes)
    for kernel in ledger.kernels:
        if kernel.flops and kernel.micro_batch == 0 and kernel.where.phase is not Phase.OPTIMIZER:
            enter(f"{kernel.where.phase}_flops", kernel.where, kernel.flops)
            if kernel.repeated:
                enter("recompute_flops", kernel.where, kernel.repeated)
    for kernel in (*ledger.kernels, *ledger.host_kernels):
        if kernel.where.phase is Phase.OPTIMIZER and (kernel.arithmetic or kernel.flops):
            enter("optimizer_flops", kernel.where, kernel.arithmetic + kernel.flops)
    parts = {
        name: Forms(**{form: traced.total(entries.get((form, name), [])) for form in FORMS})
        for name in components(recipe)
    }
    whole = Forms(**{form: sum((getattr(p, form) for p in parts.values()), ZERO) for form in FORMS})
    return whole, parts


def _restored(own: Forms, common: Forms, shapes: ShapeClass, to: Mapping[str, Size]) -> Forms:
    """The general class's forms where they say the same: a batch of 1 is then still a B in the formula."""

    def choice(form: str) -> Size:
        general = getattr(common, form)
        special = shapes.normal(substituted(general, to))
        return general if special == getattr(own, form) else getattr(own, form)

    return Forms(**{form: choice(form) for form in FORMS})


@dataclass(frozen=True, eq=False)
class Account:
    """Closed forms of a step for one recipe; letters are `estimator.eager.symbols.LEGEND`'s, bytes and FLOPs the units.

    Attributes:
        recipe: which statements the step executes.
        shapes: the shape class whose peak this is.
        device: whose rules.
        traced: the ledger behind it.
        executed: sums over the step, as polynomials in the letters that are not 1 in the class.
        executed_modules: the same by part of the model.
        pieces: the polynomials of the peak's maximum, each with its moment and its categories.
        first: sizes at which it holds.
        stage: of a pipeline, whose figures `evaluate` gives.
    """

    recipe: Recipe
    shapes: ShapeClass
    device: str
    traced: Trace
    executed: Forms
    executed_modules: Mapping[str, Forms]
    pieces: tuple[Piece, ...]
    first: Sizes
    stage: int = 0

    def of_stage(self, stage: int) -> Account:
        """This account, as that of a stage which is like the one that was executed."""
        return replace(self, stage=stage)

    @property
    def forms(self) -> Forms:
        """Sums over the step, as polynomials in all letters where these say the same."""
        return self._in_general[0]

    @property
    def modules(self) -> Mapping[str, Forms]:
        """The same by part of the model."""
        return self._in_general[1]

    @cached_property
    def _in_general(self) -> tuple[Forms, Mapping[str, Forms]]:
        """The sums of a step at large sizes where they are these as well; it is executed when a formula is asked for.

        A batch of 1 is then still a B in the formula.
        """
        recipe, shapes, sizes, stack = self.recipe, self.shapes, self.first, self.traced.stack
        general, enough = ShapeClass.general(sizes), _longer(recipe, sizes["L"])
        longer = recipe.layout(enough).stack if recipe.order.executed(enough) <= BLOCKS else stack
        if shapes == general and stack == longer:
            return self.executed, self.executed_modules
        with _executing:
            ledger = run_step(recipe, general, self.device, longer, general.large(sizes))
        common, common_parts = _forms(Trace(ledger, longer), recipe, general)
        to = {**shapes.letters, "L": stack.blocks}
        parts = {name: _restored(form, common_parts[name], shapes, to) for name, form in self.executed_modules.items()}
        return _restored(self.executed, common, shapes, to), parts

    def __getattr__(self, name: str) -> sympy.Expr:
        """The form `name` (`FORMS`) as a sympy expression."""
        if name not in FORMS:
            raise AttributeError(f"Account has no {name!r}; its forms are {', '.join(FORMS)} and peak_bytes")
        return expression(getattr(self.forms, name))

    @cached_property
    def peak_bytes(self) -> sympy.Expr:
        """The peak of live bytes: a Max of the undominated polynomials, exact in the shape class `shapes`.

        A letter that is 1 in that class (`shapes.numbers`) does not occur; `evaluate` and `lambdify` pick the class by
        themselves.
        """
        import sympy  # noqa: PLC0415 - half a second that only formulas need

        return sympy.Max(*(expression(p.live) for p in self.pieces), evaluate=False)

    def by_module(self, form: str) -> dict[str, sympy.Expr]:
        """The form `form` by part of the model; the parts add up to the whole."""
        choose("form", form, FORMS)
        return {name: expression(getattr(part, form)) for name, part in self.modules.items()}

    def latex(self, form: str = "peak_bytes") -> str:
        """LaTeX of a form."""
        import sympy  # noqa: PLC0415 - likewise

        choose("form", form, (*FORMS, "peak_bytes"))
        return str(sympy.latex(getattr(self, form)))

    def for_sizes(self, m: ModelConfig, p: Plan) -> Account:
        """This account, or the one of the shape class that `m` and `p` are in."""
        rank = max(self.recipe.rank, self.recipe.expert_rank)
        return account(m, p, self.device, self.stage if self.recipe.pipeline else rank)

    def evaluate(self, m: ModelConfig, p: Plan, threads: int | None = None) -> Values:
        """The figures for `m` and `p`; `threads` are PyTorch's CPU threads, all cores by default.

        Raises:
            ConfigError: `m` and `p` take another recipe than this account's.
        """
        return self.for_sizes(m, p).values(sizes_for(m, p, threads, self.stage))

    def values(self, sizes: Mapping[str, int]) -> Values:
        """The figures at `sizes`, which must be in this account's shape class.

        Raises:
            TooLargeError: one of them is beyond 64 bits.
        """
        point = self._compiled.at(sizes)
        ruling = self._ruling(point)
        piece = self.pieces[ruling]
        value, values = self._compiled.value, as_sizes(sizes)
        whole = {form: value((form,), point) for form in FORMS}
        peak = value(("live", ruling), point)
        alive = {c: int(values.value(size)) for c, size in piece.categories.items()}
        given = {field: sizes[letter] for letter, field in GIVEN.items() if letter in sizes}
        for form, figure in (*whole.items(), ("peak_bytes", peak)):
            check_figure(form, figure, given)
        return Values(
            **whole,
            peak_bytes=peak,
            peak_categories={c.value: alive.get(c, 0) for c in Category},
            peak_where=self.traced.named(piece.where, self.turns(sizes)),
            modules={
                name: Forms(**{form: value((form, name), point) for form in FORMS}) for name in self.executed_modules
            },
        )

    def turns(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """How many turns each group of alike blocks has at `sizes`."""
        return self.recipe.layout(sizes["L"]).turns

    @property
    def fused_kernel(self) -> str:
        """The kernel of attention: `recipe.attention`, or what takes its place for a mask or a width that it lacks."""
        names = {kernel.name for kernel in self.traced.ledger.kernels}
        if self.recipe.attention in ("flash", "efficient") and not names & {"flash_attention", "masked_attention"}:
            return "math"  # of a width that no fused kernel takes
        masked = "masked_attention" in names
        return fused_kernel(self.recipe.attention, self.device, masked=masked)

    def symbols_at(self, sizes: Mapping[str, int]) -> dict[sympy.Symbol, int]:
        """The numbers behind the symbols of the closed forms, for `sympy.Expr.subs`."""
        values = as_sizes(sizes)
        return {SYMBOLS[LETTERS[i].name]: values.of(i) for i in self.compiled.written(self.compiled.keys)}

    def ruling(self, sizes: Mapping[str, int]) -> int:
        """Which of `pieces` is the greatest at `sizes`, and so the peak."""
        return self._ruling(self._compiled.at(sizes))

    def _ruling(self, point: Sequence[int]) -> int:
        return max(range(len(self.pieces)), key=lambda i: self._compiled.value(("live", i), point))

    def lambdify(self) -> Callable[..., NDArray[np.int64]]:
        """A vectorised function `peak(B=..., T=..., ...)` of numbers or numpy arrays that broadcast: peak bytes.

        Takes the letters of the model (`recipe.letters`) as keywords and `n`, CPU threads. B and T must be given; any
        other that is left out is derived as in `ModelConfig` (k = h, e = d / h, f = 4 d, C = T) or, if it cannot be,
        asked for by name. Each point is computed in its own shape class, exactly, up to 2^53 bytes. `sliding_window` is
        the model's, if it has one: points of no more than so many tokens take no mask.
        """
        return vectorised_peak(self.recipe, self.device)

    @cached_property
    def compiled(self) -> Polynomials:
        """All closed forms, ready to evaluate at any sizes: (form,), (form, module), ("live", piece)."""
        return self._polynomials(self.forms, self.modules)

    @cached_property
    def _compiled(self) -> Polynomials:
        """The same for sizes in the shape class."""
        return self._polynomials(self.executed, self.executed_modules)

    def _polynomials(self, whole: Forms, modules: Mapping[str, Forms]) -> Polynomials:
        rows: dict[tuple[Any, ...], Size] = {(form,): getattr(whole, form) for form in FORMS}
        rows |= {(form, name): getattr(part, form) for name, part in modules.items() for form in FORMS}
        rows |= {("live", i): piece.live for i, piece in enumerate(self.pieces)}
        return Polynomials(rows)


def vectorised_peak(recipe: Recipe, device: str) -> VectorisedPeak:
    """The peak of `recipe`'s steps on `device` as a function of arrays of sizes."""
    return VectorisedPeak(recipe, device, account_at)


_known = _Known(48)  # of some 1 to 2 MB each: a page of many visitors is to stay below 600 MB
