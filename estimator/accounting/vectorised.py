"""The peak at a million points at once: sweeps, plots and searches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.accounting.trace import executed_blocks
from estimator.describe.checks import ConfigError, choose
from estimator.eager.sizes import MASK_ALIGNMENT, cpu_threads, derived_letters, row_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import ArrayLike, NDArray

    from estimator.accounting.accounts import Account
    from estimator.models.layers import Recipe

GEOMETRY = tuple("BTLdhkefVC")  # the letters that a user gives


@dataclass(frozen=True)
class VectorisedPeak:
    """What `Account.lambdify` returns: peak bytes of one recipe as a function of the legend's letters."""

    recipe: Recipe
    device: str
    account_at: Callable[[Mapping[str, int], int | None], Account]  # at sizes, and a sliding window's tokens

    def __call__(self, *, sliding_window: int | None = None, **letters: ArrayLike) -> NDArray[np.int64]:
        """Peak bytes at each point; the letters are positive integers or arrays of them, and broadcast.

        Args:
            sliding_window: the model's, in tokens; None means that it has none.
            letters: the sizes.

        Raises:
            ConfigError: a letter is unknown, missing or below 1, or the window of a recipe that has one is missing.
        """
        if sliding_window is None and self.recipe.window != "none":
            raise ConfigError("sliding_window is missing: this step's attention has one; give its tokens")
        sizes = self._complete(letters)
        shape = np.broadcast_shapes(*(x.shape for x in sizes.values()))
        fixed = {name: int(x.flat[0]) for name, x in sizes.items() if x.size == 1}
        varying = {name: np.broadcast_to(x, shape).ravel() for name, x in sizes.items() if x.size > 1}
        codes = self._codes({**fixed, **varying}, sliding_window)
        out = np.empty(int(np.prod(shape)), dtype=np.int64)
        for code in np.unique(codes):
            here = np.flatnonzero(codes == code) if codes.size > 1 else slice(None)
            points = {name: x[here] for name, x in varying.items()}
            first = {name: int(x[0]) for name, x in points.items()}
            account = self.account_at({**fixed, **first}, sliding_window)
            keys = [("live", i) for i in range(len(account.pieces))]
            used = account.compiled.letters(keys)
            arrays = {name: x.astype(np.float64) for name, x in points.items() if name in used}
            out[here] = account.compiled.greatest(keys, {**fixed, **arrays})
        return out.reshape(shape)

    def _complete(self, letters: dict[str, ArrayLike]) -> dict[str, NDArray[np.int64]]:
        for name in letters:
            choose("letter", name, (*GEOMETRY, "n", "D"))
        given = {name: np.asarray(x, dtype=np.int64) for name, x in letters.items()}
        for name, x in given.items():
            if x.size and x.min() < 1:
                raise ConfigError(f"{name} = {x.min()}: must be an integer of at least 1")
        if "T" in given:
            given.setdefault("C", given["T"])
        if "h" in given:
            given.setdefault("k", given["h"])
        if "d" in given and "h" in given:
            given.setdefault("e", given["d"] // given["h"])
        if "d" in given and self.recipe.family == "gpt2":
            given.setdefault("f", 4 * given["d"])
        given.setdefault("n", np.asarray(cpu_threads()))
        if self.recipe.parallel.startswith("zero") and np.min(given.get("D", 1)) < 2:
            raise ConfigError(f"D: {self.recipe.parallel} is shared by accelerators; give how many, at least 2")
        given.setdefault("D", np.asarray(1))
        for name in GEOMETRY:
            if name not in given:
                raise ConfigError(f"{name} is missing: give each of {', '.join(GEOMETRY)} that the others do not imply")
        return given | derived_letters(self.recipe.family, given, self.device)

    def _codes(self, sizes: dict[str, Any], sliding_window: int | None) -> NDArray[np.int64]:
        """A number for each point that tells its shape class (`ShapeClass.at`), layers and window from all others."""
        facts = [sizes[name] == 1 for name in "BTdhkefVC"]
        facts += [sizes["e"] == 2, sizes["k"] == sizes["h"], sizes["h"] * sizes["e"] == sizes["d"]]
        facts += [rows % sizes["D"] != 0 for rows in row_counts(sizes).values()]
        if sliding_window is not None:
            facts += [sizes["T"] > sliding_window, sizes["T"] % MASK_ALIGNMENT != 0]
        code: Any = np.zeros(1, dtype=np.int64)
        for bit, fact in enumerate(facts):
            if np.any(fact):
                code = code | (np.asarray(fact, dtype=np.int64) << bit)
        code = code | (np.asarray(executed_blocks(sizes["L"], self.recipe.checkpoint_every)) << len(facts))
        return np.atleast_1d(np.asarray(code))
