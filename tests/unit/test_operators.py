"""Single operators against what others timed and measured, one by one."""

from pathlib import Path

import numpy as np
import pytest

from estimator.eager.ledger import ACCESSES
from estimator.studies import operators as o

ROOT = Path(__file__).parents[2]
WORKSPACE = 8_519_680  # bytes of cuBLAS's on Ampere, which is no tensor


def errors(operator, *, eager=True):
    found = [r for r in o.above_the_floor() if r.operator == operator and r.eager is eager]
    return np.median([abs(o.predicted_seconds(r) / r.value - 1) for r in found])


def memory(operator, mode="full"):
    found = [r for r in o.timed() if (r.metric, r.operator, r.mode) == ("memory", operator, mode) and r.eager]
    assert found
    return [(r, r.value - o.predicted_bytes(r)) for r in found]


def test_operators_are_predicted_within_an_eighth():
    assert o.median_error() <= 0.12
    for operator in ("rms_norm", "rope", "layer_norm", "cross_entropy", "swiglu", "geglu"):
        assert errors(operator) <= 0.12, operator


def test_the_bytes_of_cross_entropy_and_layer_norm_are_those_measured():
    for operator in ("cross_entropy", "layer_norm"):
        assert all(abs(difference) < 0.2 * 2**20 for _, difference in memory(operator))


@pytest.mark.parametrize(("operator", "workspaces"), [("swiglu", 2), ("geglu", 2), ("rope", 1)])
def test_what_is_missing_is_the_workspace_of_cublas(operator, workspaces):
    assert all(abs(difference - workspaces * WORKSPACE) < 0.25 * 2**20 for _, difference in memory(operator))


def test_what_is_missing_of_rms_norm_is_the_gradient_that_the_benchmark_hands_in():
    for row, difference in memory("rms_norm"):
        assert abs(difference - 2 * row.sizes["T"] * row.sizes["d"]) < 0.5 * 2**20


def test_what_is_missing_of_a_linear_loss_is_the_other_providers_weight():
    for row, difference in memory("fused_linear_cross_entropy"):
        weight = 2 * row.sizes["V"] * row.sizes["d"]
        assert abs(difference - weight - 2 * WORKSPACE) < 33 * 2**20


def test_what_grows_of_an_embedding_beside_the_tables_is_sums_over_parts():
    by_width = {}
    for row, difference in memory("embedding"):
        by_width.setdefault(row.sizes["d"], []).append(difference - 4 * row.sizes["V"] * row.sizes["d"])
    for width, rest in by_width.items():  # at most a row of the scratch for each of the 16,384 ids
        assert max(rest) - min(rest) <= 4 * 16_384 * width * 1.1


def test_kernels_say_how_they_walk_their_operands():
    row = next(r for r in o.timed() if r.operator == "rms_norm" and r.eager)
    found = {(r.name, r.access) for r in o.program(row).rows}
    assert ("_to_copy", "cast") in found
    assert ("pow", "plain") in found
    assert ("mul", "strided") in found  # by one number a row
    assert {access for _, access in found} <= set(ACCESSES)


def test_the_kept_report_is_todays():
    assert (ROOT / "validation" / "operators.md").read_text() == o.report()
