"""A few turns of each group of blocks against steps that execute every block of the model."""

from __future__ import annotations

import pytest

from estimator.accounting.accounts import FORMS, _account, account, recipe_of, sizes_for
from estimator.describe.model import ModelConfig
from estimator.describe.parts import Layer, Pattern
from estimator.describe.plan import Plan
from estimator.eager.letters import Sizes, evaluate
from estimator.eager.repetition import Group, Stack

WINDOW, FULL, UNROTATED = Layer("window"), Layer(), Layer(rotates=False)
PATTERNS = {
    "two groups": (Pattern((WINDOW,) * 4, (FULL,)), 11),
    "two groups of patterns": (Pattern((WINDOW, FULL) * 3, (UNROTATED, FULL, WINDOW)), 18),
    "a block between": (Pattern((WINDOW,) * 3 + (FULL,), (UNROTATED,)), 9),
    **{
        f"{n - 1} windows and one without": (Pattern((), (WINDOW,) * (n - 1) + (FULL,)), 4 * n + n // 2)
        for n in range(2, 7)
    },
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_few_turns_stand_for_all(pattern):
    """What follows from a few turns of each group is what a step has that executes every block."""
    layers, count = PATTERNS[pattern]
    m = ModelConfig("llama", count, 12, 2, 17, 8, 1, 6, 20, sliding_window=3, pattern=layers)
    several = len(layers.cycle) < 4  # a step of many blocks takes its time
    plan = {"checkpointing": "block", "grad_accumulation": 2} if several else {}
    p = Plan(batch_size=2, optimizer="sgd-momentum", **plan)
    recipe, sizes = recipe_of(m, p, "cpu"), sizes_for(m, p, threads=1)
    short, turns = account(m, p, "cpu"), recipe.layout(count)
    every = Stack(tuple(Group((turns.stack.kinds[at],), 1) for at in _blocks(turns, count)))
    whole = _account(recipe, short.shapes, "cpu", every, sizes)
    assert len(every.places) == count > len(turns.stack.places)
    known, expected = short.values(sizes), whole.values(sizes)
    assert known.peak_bytes == expected.peak_bytes
    assert {form: getattr(known, form) for form in FORMS} == {form: getattr(expected, form) for form in FORMS}
    written_in = {str(symbol) for form in FORMS for symbol in getattr(short, form).free_symbols}
    letters = {f"L_{i + 1}" for i in turns.stack.repeated} if len(turns.stack.repeated) > 1 else {"L"}
    assert {name for name in written_in if name.startswith("L")} == letters


def _blocks(found, count):
    """The executed block that stands for each block of the model."""
    sizes = Sizes(L=count, **found.values)
    of = {
        found.stack.real_index(block, found.turns, turn): block
        for block in range(len(found.stack.places))
        for turn in range(evaluate(found.stack.times(block), sizes))
    }
    return [of[i] for i in range(count)]
