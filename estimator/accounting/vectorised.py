"""The peak at a million points at once: sweeps, plots and searches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.accounting.sizes import GIVEN, cpu_threads
from estimator.describe.checks import (
    BLOCKS_OF_A_SWEEP,
    FIGURE,
    POINTS_OF_PEAKS,
    ConfigError,
    check_figure,
    choose,
    shown,
)
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.run import Run
from estimator.describe.settings import limits
from estimator.eager.letters import Sizes
from estimator.eager.sizes import is_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import ArrayLike, NDArray

    from estimator.accounting.accounts import Account
    from estimator.eager.repetition import Stack
    from estimator.models.layers import Recipe

FOLLOWING = ("g", "n", "D", "W", "A")  # letters that need not be given


@dataclass(frozen=True)
class VectorisedPeak:
    """What `Account.lambdify` returns: peak bytes of one recipe as a function of the legend's letters."""

    recipe: Recipe
    device: str
    account_at: Callable[[Recipe, Mapping[str, int], str], Account]

    def __call__(self, *, sliding_window: int | None = None, **letters: ArrayLike) -> NDArray[np.int64]:
        """Peak bytes at each point; the letters are positive integers or arrays of them, and broadcast.

        Args:
            sliding_window: the model's, in tokens; None means that it has none.
            letters: the sizes.

        Raises:
            ConfigError: a letter is unknown, missing or below 1, or the window of a recipe that has one is missing.
        """
        if sliding_window is None and any(layer.attention == "window" for layer in self.recipe.kinds):
            raise ConfigError("sliding_window is missing: this step's attention has one; give its tokens")
        sizes = self._complete(letters)
        if sliding_window is not None:
            sizes["W"] = np.asarray(sliding_window)
        shape = np.broadcast_shapes(*(x.shape for x in sizes.values()))
        fixed = {name: int(x.flat[0]) for name, x in sizes.items() if x.size == 1}
        varying = {name: np.broadcast_to(x, shape).ravel() for name, x in sizes.items() if x.size > 1}
        out = np.empty(int(np.prod(shape)), dtype=np.int64)
        for account, here in self.accounts({**fixed, **varying}):
            keys = [("live", i) for i in range(len(account.pieces))]
            used = account.compiled.letters(keys)
            arrays = {name: x[here].astype(np.float64) for name, x in varying.items() if name in used}
            try:
                out[here] = account.compiled.greatest(keys, Sizes({**fixed, **arrays}))
            except OverflowError:
                most = {field: int(np.max(sizes[letter])) for letter, field in GIVEN.items() if letter in sizes}
                check_figure("peak_bytes", FIGURE + 1, most)
        return out.reshape(shape)

    def accounts(self, sizes: Mapping[str, Any]) -> Iterator[tuple[Account, NDArray[np.intp]]]:
        """The accounts that hold at the points of `sizes`, numbers or arrays of one length; each with its points.

        Raises:
            ConfigError: together they take more blocks to be run one by one than is reckoned with.
        """
        codes, blocks = self._codes(sizes)
        if blocks > BLOCKS_OF_A_SWEEP:
            raise ConfigError(
                f"points: those of their own shape or number of layers take {blocks:,} blocks to be run one by one; "
                f"allowed are {BLOCKS_OF_A_SWEEP:,}: take fewer of them, or a smaller checkpoint_every "
                f"({self.recipe.checkpoint_every})"
            )
        count = max(np.size(x) for x in sizes.values())
        for code in np.unique(codes):
            here = np.flatnonzero(codes == code) if codes.size > 1 else np.arange(count)
            while len(here):
                points = {name: x[here] if np.ndim(x) else x for name, x in sizes.items()}
                first = {name: int(x[0]) if np.ndim(x) else int(x) for name, x in points.items()}
                first |= self.recipe.layout(first["L"]).values
                account = self.account_at(self.recipe, Sizes(first), self.device)
                holds, values = np.ones(len(here), dtype=bool), Sizes(points)
                for fact, answer in account.traced.ledger.facts.items():
                    holds &= np.asarray(fact.answer(values)) == answer
                yield account, here[holds]
                here = here[~holds]

    def _complete(self, letters: dict[str, ArrayLike]) -> dict[str, NDArray[np.int64]]:
        needed = [name for name in self.recipe.letters if name not in FOLLOWING]
        for name in letters:
            choose("letter", name, (*needed, "n", "D"))
        most = limits(ModelConfig, Plan, Run)
        given = {name: whole_numbers(name, x, most.get(GIVEN.get(name, name))) for name, x in letters.items()}
        try:
            points = math.prod(np.broadcast_shapes(*(x.shape for x in given.values())))
        except ValueError as error:
            raise ConfigError(f"letters = {', '.join(given)}: their shapes do not broadcast ({error})") from None
        if points > POINTS_OF_PEAKS:
            raise ConfigError(f"points = {points}: must be at most {POINTS_OF_PEAKS:,}; take them in pieces")
        if "T" in given:
            given.setdefault("C", given["T"])
        if "h" in given:
            given.setdefault("k", given["h"])
        if "d" in given and "h" in given:
            given.setdefault("e", given["d"] // given["h"])
        if "d" in given and not self.recipe.parts.mlp.gated:
            given.setdefault("f", 4 * given["d"])
        given.setdefault("n", np.asarray(cpu_threads()))
        if self.recipe.parallel.startswith("zero") and np.min(given.get("D", 1)) < 2:
            raise ConfigError(f"D: {self.recipe.parallel} is shared by accelerators; give how many, at least 2")
        given.setdefault("D", np.asarray(1))
        for name in needed:
            if name not in given:
                raise ConfigError(f"{name} is missing: give each of {', '.join(needed)} that the others do not imply")
        if "T_l" in given and np.any(given["T_l"] >= given["T"]):
            raise ConfigError(
                f"logits_to_keep = {int(np.max(given['T_l']))}: the shortest of these sequences has "
                f"{int(np.min(given['T']))} tokens; allowed are less"
            )
        given.setdefault("g", given["h"] // given["k"])
        given.setdefault("W", given["C"])
        given.setdefault("A", given["C"])
        deep, which = np.unique(given["L"], return_inverse=True)
        turns = [self.recipe.layout(int(n)).values for n in deep]
        for name in dict.fromkeys(name for values in turns for name in values):  # of a model without, no form has it
            given[name] = np.array([values.get(name, 1) for values in turns])[which].reshape(given["L"].shape)
        return given

    def _codes(self, sizes: Mapping[str, Any]) -> tuple[NDArray[np.int64], int]:
        """A number for each point that tells its shape class (`ShapeClass.at`) and its stack from all others.

        And how many blocks it takes to run one of each.
        """
        halved = self.recipe.halved
        facts = [sizes[name] < 4 if name in halved else sizes[name] == 1 for name in sizes if not is_count(name)]
        facts += [sizes[name] == 2 for name in sorted(halved)]
        facts += [sizes["k"] == sizes["h"], sizes["h"] * sizes["e"] == sizes["d"]]
        code: Any = np.zeros(1, dtype=np.int64)
        for bit, fact in enumerate(facts):
            if np.any(fact):
                code = code | (np.asarray(fact, dtype=np.int64) << bit)
        deep, which = np.unique(np.atleast_1d(sizes["L"]), return_inverse=True)
        stacks: dict[Stack, int] = {}
        different = [stacks.setdefault(self.recipe.layout(int(n)).stack, len(stacks)) for n in deep]
        code = code | (np.asarray(different, dtype=np.int64)[which] << len(facts))
        codes = np.atleast_1d(np.asarray(code))
        executed = [len(stack.places) for stack in stacks]
        return codes, sum(executed[i] for i in np.unique(codes) >> len(facts))


def whole_numbers(name: str, values: ArrayLike, most: int | None = None) -> NDArray[np.int64]:
    """`values` as 64-bit integers, at least 1 and at most `most`.

    Raises:
        ConfigError: they are not.
    """
    try:
        found = np.asarray(values, dtype=np.int64)
    except (OverflowError, TypeError, ValueError):
        raise ConfigError(f"{name} = {shown(values)}: must be integers of at least 1, of 64 bits") from None
    if found.size and found.min() < 1:
        raise ConfigError(f"{name} = {found.min()}: must be an integer of at least 1")
    if found.size and most is not None and found.max() > most:
        raise ConfigError(f"{name} = {found.max()}: must be at most {most:,}")
    return found
