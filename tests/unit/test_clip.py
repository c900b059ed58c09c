import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from estimator.describe.checks import ConfigError
from trainer.optim.clip import gradient_clipping

shapes = st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=6)


def parameters(shapes, seed, scale=1.0, dtype=torch.float64):
    """Parameters with random gradients; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    ps = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for p in ps:
        p.grad = (scale * torch.randn(p.shape, generator=g, dtype=torch.float64)).to(dtype)
    return ps


def joint_norm(ps):
    return math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in ps if p.grad is not None))


@settings(deadline=None)
@given(shapes, st.integers(0, 2**32), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sampled_from([1e-6, 1e-2]))
def test_the_norm_comes_back_and_what_is_left_is_within_the_limit(shapes, seed, scale, max_norm, eps):
    ps = parameters(shapes, seed, scale)
    before = [p.grad.clone() for p in ps]
    norm = gradient_clipping(ps, max_norm, eps)
    assert norm.ndim == 0
    assert norm.item() == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in before)))
    assert joint_norm(ps) <= max_norm * (1 + 1e-9)
    factor = min(1.0, max_norm / (norm.item() + eps))
    for p, g in zip(ps, before, strict=True):  # one factor for all: the direction stays
        torch.testing.assert_close(p.grad, factor * g)
        if factor == 1.0:
            assert torch.equal(p.grad, g)


@given(shapes, st.integers(0, 2**32), st.floats(1e-2, 1e2))
@settings(deadline=None)
def test_agrees_with_torch(shapes, seed, max_norm):
    ours, theirs = (parameters(shapes, seed, 3.0) for _ in range(2))
    a = gradient_clipping(ours, max_norm)
    b = nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(a, b)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_generators_single_tensors_frozen_and_no_parameters():
    ps = parameters([(3,), (2, 2), (4,)], 0)
    ps[1].grad = None
    expected = joint_norm(ps)
    assert gradient_clipping((p for p in ps), 1e-3).item() == pytest.approx(expected)
    assert joint_norm(ps) == pytest.approx(1e-3, rel=1e-2)
    assert ps[1].grad is None
    (single,) = parameters([(3,)], 1)
    assert gradient_clipping(single, 1.0).item() == pytest.approx(joint_norm([*parameters([(3,)], 1)]))
    assert gradient_clipping([], 1.0) == 0
    assert gradient_clipping([ps[1]], 1.0) == 0


def test_gradients_are_scaled_in_place():
    ps = parameters([(3,), (2, 2)], 0, scale=100.0)
    pointers = [p.grad.data_ptr() for p in ps]
    gradient_clipping(ps, 1.0)
    assert [p.grad.data_ptr() for p in ps] == pointers


def test_several_dtypes():
    ps = [*parameters([(30,)], 0), *parameters([(20,)], 1, dtype=torch.float32)]
    ps += parameters([(10,)], 2, dtype=torch.bfloat16)
    expected = joint_norm(ps)
    assert gradient_clipping(ps, 0.5).item() == pytest.approx(expected, rel=1e-2)
    assert joint_norm(ps) == pytest.approx(0.5, rel=1e-2)
    assert [p.grad.dtype for p in ps] == [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_is_reported_and_leaves_the_gradients(bad):
    ps = parameters([(3,), (2, 2)], 0, scale=100.0)
    ps[1].grad[0, 1] = bad
    before = [p.grad.clone() for p in ps]
    assert not gradient_clipping(ps, 1.0).isfinite()
    for p, g in zip(ps, before, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_norm": 0}, "max_norm = 0: must be above 0"),
        ({"max_norm": -1.0}, r"max_norm = -1\.0"),
        ({"max_norm": math.nan}, "max_norm = nan"),
        ({"max_norm": 1.0, "eps": -1e-6}, "eps = -1e-06"),
    ],
)
def test_refuses(limit, message):
    with pytest.raises(ConfigError, match=message):
        gradient_clipping(parameters([(3,)], 0), **limit)


def test_shards_of_distributed_tensors_share_one_norm(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole, sharded = parameters([(6, 4), (4,)], 0), []
        for p in whole:
            sharded.append(nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
            sharded[-1].grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
        assert gradient_clipping(sharded, 0.1) == gradient_clipping(whole, 0.1)
        for p, q in zip(sharded, whole, strict=True):
            assert torch.equal(p.grad.full_tensor(), q.grad)
    finally:
        dist.destroy_process_group()
