"""Schedules of micro-batches: what is one, and what it holds at a time."""

import pytest

from estimator.describe.checks import ConfigError
from estimator.describe.schedules import accumulation, all_forward_first, in_flight, micro_batches, read, written

pytestmark = pytest.mark.quick


def test_moves_are_read_as_they_are_written():
    assert written(accumulation(2)) == "F0 B0 F1 B1"
    assert written(all_forward_first(2)) == "F0 F1 B0 B1"
    for text in ("F0 B0", "F0 F1 B1 B0", "F0 F1 B0 F2 B1 B2"):
        assert written(read(text)) == text
    assert micro_batches(read("F0 F1 B0 F2 B1 B2")) == 3


@pytest.mark.parametrize(
    ("text", "most"), [("F0 B0 F1 B1", 1), ("F0 F1 B0 B1", 2), ("F0 F1 B0 F2 B1 B2", 2), ("F0 F1 F2 B2 B1 B0", 3)]
)
def test_graphs_that_are_alive_at_a_time(text, most):
    assert in_flight(read(text)) == most


@pytest.mark.parametrize(
    "text", ["", "F0", "B0 F0", "F1 B1", "F1 F0 B0 B1", "F0 B0 B0", "F0 F0 B0 B0", "F0 B0 U", "Fx"]
)
def test_what_is_no_schedule(text):
    with pytest.raises(ConfigError, match="schedule = "):
        read(text)
