"""Blocks that are alike, as groups: the layouts of published models worked out by hand, and what holds for any."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.eager.letters import Sizes, evaluate, written
from estimator.eager.repetition import Group, executed, layout, runs

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("kinds", "groups"),
    [
        ("a", [("a", 1)]),
        ("aaaa", [("a", 4)]),
        ("ababab", [("ab", 3)]),
        ("dddeeeee", [("d", 3), ("e", 5)]),
        ("aabaabaab", [("aab", 3)]),
        ("abc", [("a", 1), ("b", 1), ("c", 1)]),
        ("xababab", [("x", 1), ("ab", 3)]),
        ("aaaab", [("a", 4), ("b", 1)]),
    ],
)
def test_blocks_in_a_row_as_groups(kinds, groups):
    assert runs(kinds) == [Group(tuple(pattern), turns) for pattern, turns in groups]


def test_gpt2_xl():
    """48 equal blocks: three are executed, and the one in the middle stands for 46."""
    found = layout((), ("block",), 48)
    assert found.stack.groups == (Group(("block",), 3),)
    assert [written(x) for x in found.stack.repetitions] == ["L - 2"]
    assert [evaluate(found.stack.times(i), {"L": 48}) for i in range(3)] == [1, 46, 1]
    assert [found.stack.real_index(i, found.turns) for i in range(3)] == [0, 1, 47]
    assert found.stack.real_index(1, found.turns, turn=45) == 46
    assert found.values == {"L_1": 48}


def test_deepseek_v3():
    """61 layers, the first three dense (its config.json: first_k_dense_replace 3): one dense and 56 sparse repeat."""
    found = layout(("dense",) * 3, ("sparse",), 61)
    assert found.stack.groups == (Group(("dense",), 3), Group(("sparse",), 3))
    assert [written(x) for x in found.stack.repetitions] == ["L_1 - 2", "L_2 - 2"]
    assert written(found.stack.blocks) == "L_1 + L_2"
    sizes = Sizes(L=61, **found.values)
    assert [evaluate(x, sizes) for x in found.stack.repetitions] == [1, 56]
    assert [found.stack.real_index(i, found.turns) for i in range(6)] == [0, 1, 2, 3, 4, 60]


def test_gemma3_27b():
    """62 layers, five with a window then one without: ten turns of six, and two with a window at the end."""
    found = layout((), ("window",) * 5 + ("full",), 62)
    assert found.turns == (10, 1)
    assert len(found.stack.places) == 3 * 6 + 2
    assert [evaluate(x, {"L": 62}) for x in found.stack.repetitions] == [8]
    assert found.stack.kinds[-2:] == ("window", "window")
    assert [found.stack.real_index(i, found.turns) for i in (0, 6, 12, 17, 18, 19)] == [0, 6, 54, 59, 60, 61]


def test_two_turns_are_executed_as_they_are():
    found = layout((), ("a", "b"), 4)
    assert found.stack.repetitions == ()
    assert evaluate(found.stack.blocks, {}) == 4


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
       st.integers(1, 40))  # fmt: skip
def test_every_block_of_the_model_is_stood_for_once(first, cycle, count):
    """Executed blocks, each as often as it happens, are the model's blocks, each of its own kind."""
    kinds = [*first, *(cycle * count)][:count]
    found = layout(tuple(first), tuple(cycle), count)
    sizes = Sizes(L=count, **found.values)
    covered = {}
    for block, kind in enumerate(found.stack.kinds):
        for turn in range(evaluate(found.stack.times(block), sizes)):
            index = found.stack.real_index(block, found.turns, turn)
            assert index not in covered
            covered[index] = kind
    assert [covered[i] for i in range(count)] == kinds


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("ab", min_size=1, max_size=24))
def test_groups_spell_out_the_blocks(kinds):
    groups = runs(kinds)
    assert "".join("".join(group.pattern) * group.turns for group in groups) == kinds
    assert sum(len(g.pattern) * g.turns for g in groups) == len(kinds)
    assert all(group.turns <= 3 for group in executed(groups).stack.groups)
