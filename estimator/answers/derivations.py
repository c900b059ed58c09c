"""Every headline figure with its formula, the formula with numbers in it, the result and where it comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import sympy

from estimator.accounting.accounts import FORMS, account_at
from estimator.describe.checks import ConfigError, choose
from estimator.describe.units import SECONDS_PER_HOUR
from estimator.eager.letters import SYMBOLS, as_sizes, expression, index_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from estimator.accounting.accounts import Account
    from estimator.answers.estimates import Estimate
    from estimator.timing.speed import Time

LEDGER = "read off the ledger of one symbolic step, by the rules of PyTorch eager"
TITLES = {
    "parameters": "Parameters",
    "active_parameters": "Parameters that a token goes through",
    "trained_parameters": "Parameters that are trained",
    "parameter_bytes": "Bytes of parameters",
    "gradient_bytes": "Bytes of gradients",
    "optimizer_bytes": "Bytes of optimizer state",
    "activation_bytes": "Bytes of activations saved for backward",
    "forward_flops": "FLOPs forward, one micro-batch",
    "backward_flops": "FLOPs backward, one micro-batch",
    "recompute_flops": "of which recomputation",
    "optimizer_flops": "FLOPs of the optimizer, one step",
}

# Left-hand sides, in LaTeX.
SYMBOL_OF = {
    "peak": r"M_{\mathrm{peak}}",
    "needed": r"M_{\mathrm{needed}}",
    "hours": r"t_{\mathrm{run}}",
    "parameters": "N",
    "active_parameters": r"N_{\mathrm{active}}",
    "trained_parameters": r"N_{\mathrm{trained}}",
    "parameter_bytes": r"M_{\mathrm{param}}",
    "gradient_bytes": r"M_{\mathrm{grad}}",
    "optimizer_bytes": r"M_{\mathrm{opt}}",
    "activation_bytes": r"M_{\mathrm{act}}",
    "forward_flops": r"F_{\mathrm{fwd}}",
    "backward_flops": r"F_{\mathrm{bwd}}",
    "recompute_flops": r"F_{\mathrm{recompute}}",
    "optimizer_flops": r"F_{\mathrm{opt}}",
}


@dataclass(frozen=True, slots=True)
class Derivation:
    """How one figure comes about.

    Attributes:
        name: the field of the library that holds the figure.
        title: what it is, in words.
        formula: the right-hand side, a sympy expression.
        values: each symbol of the formula and its number.
        result: the formula's value; an int where the figure is one.
        unit: of the result: "", "bytes", "FLOPs", "s", "h", "sequences".
        source: where the formula comes from.
    """

    name: str
    title: str
    formula: sympy.Expr
    values: Mapping[sympy.Symbol, float]
    result: float
    unit: str
    source: str

    @property
    def latex(self) -> str:
        """The formula as LaTeX."""
        return str(sympy.latex(self.formula))

    @property
    def substituted(self) -> str:
        """The formula as LaTeX with a number for each symbol."""
        names = {symbol: latex_number(value) for symbol, value in self.values.items()}
        return str(sympy.latex(self.formula, symbol_names=names, mul_symbol="times"))

    def aligned(self, terms: int = 5) -> str:
        """Formula, numbers and result as one LaTeX display, with at most so many terms on a line.

        What every layer and every token have in common is taken out of the brackets, so that a line says what it is
        for: each token of each layer, each token, each layer, and once.
        """
        names = {symbol: latex_number(value) for symbol, value in self.values.items()}
        lines = _lines(self.formula, terms, {}) + _lines(
            self.formula, terms, {"symbol_names": names, "mul_symbol": "times"}
        )
        unit = rf"\ \mathrm{{{self.unit}}}" if self.unit else ""
        whole = f"{self.result:,}".replace(",", "{,}")
        left, result = SYMBOL_OF[self.name], whole if isinstance(self.result, int) else latex_number(self.result)
        body = r" \\ ".join([f"{left} {lines[0]}", *lines[1:], f"&= {result}{unit}"])
        return rf"\begin{{aligned}}{body}\end{{aligned}}"

    @property
    def python(self) -> str:
        """The formula as a Python expression."""
        return str(sympy.pycode(self.formula))


def grouped(formula: sympy.Expr) -> list[tuple[sympy.Expr, list[sympy.Expr]]]:
    """(factor, terms) pairs whose products add up to `formula`, the terms of the highest degree first.

    The factors are what every token of every layer, every token, every layer and everything else has in common.
    """
    layers, token = SYMBOLS["L"], SYMBOLS["B"] if SYMBOLS["B"] in formula.free_symbols else SYMBOLS["T"]
    groups: dict[tuple[bool, bool], list[sympy.Expr]] = {}
    for term in sympy.Add.make_args(formula):
        groups.setdefault((term.has(layers), term.has(token)), []).append(term)
    found = []
    for key in ((True, True), (False, True), (True, False), (False, False)):
        terms = groups.get(key, [])
        if not terms:
            continue
        powers = {term: term.as_powers_dict() for term in terms}
        factor = sympy.Mul(*(x ** min(powers[term][x] for term in terms) for x in (SYMBOLS[name] for name in "LBT")))
        if len(terms) == 1:  # nothing to bracket
            factor = sympy.Integer(1)
        degree = {term: sum(n for x, n in powers[term].items() if x.is_Symbol) for term in terms}
        terms = sorted(terms, key=lambda term: (-degree[term], sympy.default_sort_key(term)))
        found.append((factor, [term / factor for term in terms]))
    return found


def _lines(formula: sympy.Expr, terms: int, options: Mapping[str, object]) -> list[str]:
    """A formula as lines of LaTeX, each but the first with its sign."""
    if not formula.is_polynomial():
        return [f"&= {sympy.latex(formula, **options)}"]
    lines: list[str] = []
    times = rf" \{options['mul_symbol']} " if options else r"\,"
    for factor, inner in grouped(formula):
        texts = [sympy.latex(term, **options) for term in inner]
        before, after = ("", "") if factor == 1 else (rf"{sympy.latex(factor, **options)}{times}\bigl(", r"\bigr)")
        for start in range(0, len(texts), terms):
            chunk = texts[start : start + terms]
            body = "".join(f" + {text}" if not text.startswith("-") else f" {text}" for text in chunk)
            first, last = start == 0, start + terms >= len(texts)
            sign = ("&=" if not lines else r"&\quad +") if first else r"&\quad\quad"
            body = body.removeprefix(" + ") if first else body
            lines.append(f"{sign} {before if first else ''}{body}{after if last else ''}")
    return lines


def latex_number(x: float) -> str:
    """A number with its thousands apart, powers of ten where it is long."""
    if float(x).is_integer() and abs(x) < 1e9:
        return f"{int(x):,}".replace(",", r"{,}")
    mantissa, _, exponent = f"{x:.6g}".partition("e")
    return rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else mantissa


def piece(account: Account, index: int) -> sympy.Expr:
    """The polynomial `index` of the peak's maximum, in the legend's letters."""
    return expression(account.pieces[index].live)


def ruling(estimate: Estimate) -> int:
    """Which polynomial of the peak's maximum is the greatest at this estimate's sizes."""
    return estimate.account.ruling(estimate.memory.sizes)


def form(estimate: Estimate, name: str) -> Derivation:
    """One of the account's forms (`estimator.accounting.accounts.FORMS`) at this estimate's sizes.

    Raises:
        ConfigError: no such form.
    """
    formula = getattr(estimate.account, choose("form", name, FORMS))
    unit = "bytes" if name.endswith("bytes") else "FLOPs" if name.endswith("flops") else ""
    result = getattr(estimate.values, name)
    return Derivation(name, TITLES[name], formula, _sizes(estimate, formula), result, unit, _ledger(estimate))


def _ledger(estimate: Estimate) -> str:
    every, layers = estimate.account.recipe.checkpoint_every, estimate.model.num_layers
    if every == 1:
        return LEDGER
    more = f"{layers % every} more than a multiple of {every}" if layers % every else f"a multiple of {every}"
    return f"{LEDGER}; it holds where the number of blocks is {more}, as here"


def peak(estimate: Estimate) -> Derivation:
    """The polynomial that is the peak at this estimate's sizes."""
    formula = piece(estimate.account, ruling(estimate))
    others = len(estimate.account.pieces) - 1
    source = f"{_ledger(estimate)}; the greatest of the step's live bytes"
    if others:
        source += f", of which {others} other polynomials are each the greatest at other sizes"
    title = "Peak of live tensor bytes"
    return Derivation("peak", title, formula, _sizes(estimate, formula), estimate.memory.peak, "bytes", source)


def needed(estimate: Estimate) -> Derivation:
    """What must be free on the accelerator: what the allocator holds at the peak, and the CUDA context."""
    allocated, least, most = sympy.symbols(r"M_{\mathrm{allocated}} M_{\mathrm{ctx}}^{-} M_{\mathrm{ctx}}^{+}")
    memory = estimate.memory
    values = {allocated: memory.allocated, least: memory.context[0], most: memory.context[1]}
    formula = allocated + (least + most) / 2
    if any(memory.nccl):
        low, high = sympy.symbols(r"M_{\mathrm{nccl}}^{-} M_{\mathrm{nccl}}^{+}")
        values |= {low: memory.nccl[0], high: memory.nccl[1]}
        formula += (low + high) / 2
    source = (
        "allocated bytes are the peak with each tensor rounded up to 512 bytes, and the cuBLAS workspace; the CUDA "
        "context and NCCL's buffers are outside of the allocator, and take between their least and their most"
        if estimate.account.device == "cuda"
        else "the CPU's allocator adds nothing that is modelled"
    )
    return Derivation("needed", "Memory that must be free", formula, values, memory.needed, "bytes", source)


def hours(estimate: Estimate, count: int = 1) -> Derivation | None:
    """Hours of the run: a predicted step's parts, or a given MFU on `count` accelerators; None without a time."""
    time = estimate.time
    if time is None:
        return None
    if time.predicted:
        return _predicted_hours(time)
    flops = estimate.flops
    forward, backward, again = sympy.symbols(r"F_{\mathrm{fwd}} F_{\mathrm{bwd}} F_{\mathrm{recompute}}")
    steps, sequences, mfu, peak_flops, accelerators = sympy.symbols(r"S G \mathrm{MFU} P n", positive=True)
    batch = SYMBOLS["B"]
    work = forward + backward - again if flops.recompute else forward + backward
    formula = steps * (sequences / batch) * work / (mfu * peak_flops * accelerators) / SECONDS_PER_HOUR
    values = {
        forward: flops.forward,
        backward: flops.backward,
        again: flops.recompute,
        steps: time.steps or 1,
        sequences: flops.sequences,
        batch: flops.batch_size,
        mfu: time.mfu,
        peak_flops: time.peak_flops,
        accelerators: count,
    }
    if not flops.recompute:
        del values[again]
    source = "MFU as in Chowdhery et al. 2022, appendix B: recomputed FLOPs do not count as useful"
    return Derivation("hours", "Hours of the run", formula, values, time.hours, "h", source)


def _predicted_hours(time: Time) -> Derivation:
    spent = {sympy.Symbol(rf"t_{{\mathrm{{{name}}}}}", positive=True): part for name, part in time.parts.items()}
    steps = sympy.Symbol("S", positive=True)
    formula = steps * sympy.Add(*spent) / SECONDS_PER_HOUR
    return Derivation(
        "hours", "Hours of the run", formula, {steps: time.steps or 1, **spent}, time.hours, "h", time.origin
    )


def headline(estimate: Estimate, count: int = 1) -> tuple[Derivation, ...]:
    """The derivations behind the figures that the page shows first."""
    forms = ("parameters", "activation_bytes", "forward_flops", "backward_flops", "optimizer_flops")
    found = (peak(estimate), needed(estimate), hours(estimate, count), *(form(estimate, name) for name in forms))
    return tuple(d for d in found if d is not None)


def _sizes(estimate: Estimate, formula: sympy.Expr) -> dict[sympy.Symbol, float]:
    sizes = as_sizes(estimate.memory.sizes)
    return {
        symbol: sizes.of(index_of(str(symbol.name)))
        for symbol in sorted(formula.free_symbols, key=lambda s: str(s.name))
    }


def at_sizes(d: Derivation, changed: Mapping[str, float]) -> Derivation:
    """`d` with other numbers for some of its symbols, by name.

    Raises:
        ConfigError: a symbol that the formula does not have.
    """
    names = [str(symbol.name) for symbol in d.values]
    for name in changed:
        choose("symbol", name, names)
    values = {symbol: changed.get(str(symbol.name), value) for symbol, value in d.values.items()}
    exact = d.formula.subs({symbol: sympy.nsimplify(value) for symbol, value in values.items()})
    whole = isinstance(d.result, int)
    return replace(d, values=values, result=int(exact) if whole else float(exact))


def to_json(d: Derivation) -> str:
    """A derivation as JSON."""
    plain = {"name": d.name, "title": d.title, "unit": d.unit, "result": d.result, "source": d.source}
    values = {str(symbol.name): value for symbol, value in d.values.items()}
    return json.dumps(plain | {"python": d.python, "latex": d.latex, "values": values}, indent=1, allow_nan=False)


@dataclass(frozen=True)
class Regions:
    """Which polynomial of the peak's maximum is the greatest, over micro-batch and sequence length.

    Attributes:
        batches, lengths: the axes.
        index: (batches, lengths), the ruling polynomial at each point, an index into `account.pieces`.
        account: of sizes above 1, where every letter occurs in the formula.
    """

    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    index: NDArray[np.intp]
    account: Account


def regions(estimate: Estimate, batches: Sequence[int], lengths: Sequence[int]) -> Regions:
    """The regions in which each polynomial of the peak rules.

    Of a model with a sliding window, the lengths on the estimate's side of it: beyond it the step is another one.

    Raises:
        ConfigError: a micro-batch or a length below 2, where PyTorch's step is another one.
    """
    for name, values in (("batches", batches), ("lengths", lengths)):
        if min(values) < 2:
            raise ConfigError(f"{name} = {min(values)}: must be at least 2")
    window = estimate.model.sliding_window or max(lengths)
    lengths = [T for T in lengths if (window < T) == (window < estimate.plan.tokens(estimate.model))]
    general = {**estimate.memory.sizes, "B": 2, "T": 2}
    account = account_at(estimate.account.recipe, general, estimate.account.device)
    B, T = (x.ravel().astype(float) for x in np.meshgrid(batches, lengths, indexing="ij"))
    sizes: dict[str, int | NDArray[np.float64]] = {**general, "B": B, "T": T}
    live = [account.compiled.greatest([("live", i)], sizes) for i in range(len(account.pieces))]
    index = np.argmax(live, axis=0).reshape(len(batches), len(lengths))
    return Regions(tuple(batches), tuple(lengths), index, account)
