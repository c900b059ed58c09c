"""Buckets of a reducer: how many there are follows from the gradients' bytes, however many gradients there are."""

import numpy as np
import pytest

from estimator.parallel.placement import BUCKET, FIRST_BUCKET, _bucket_count


@pytest.mark.quick
def test_buckets_of_more_gradients_than_a_ufunc_has_arguments():
    assert (FIRST_BUCKET, BUCKET) == (2**20, 25 * 2**20)  # bytes: torch.nn.parallel.DistributedDataParallel's
    compute = _bucket_count((70,)).compute
    # 70 gradients of a million bytes: 2 fill the first bucket, 27 each of the next two, and 14 are left.
    assert compute(1, *[10**6] * 70) == 4
    several = compute(np.array([1, 2, 1]), *[np.array([10**6, 10**6, 10])] * 70)
    assert several.tolist() == [4, 7, 1]
