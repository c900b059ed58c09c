import copy
import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trainer.optim.optimizers
from estimator.describe.checks import ConfigError
from trainer.optim.optimizers import CPU_SLICE, SGD, AdamW, Lion
from trainer.referee.measure import allocator_events

SHAPES = [(17, 5), (40,), (1,), (3, 2, 4), ()]


def parameters(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def set_gradients(ours, theirs, seed):
    g = torch.Generator().manual_seed(seed)
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
        q.grad = p.grad.clone()


def assert_equal(ours, theirs, **tolerance):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.floats(0, 0.5),
    st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
    st.sampled_from([1e-8, 1e-3, 1.0]),
    st.floats(0, 0.5),
)
def test_adamw_agrees_with_torch(lr, betas, eps, weight_decay):
    ours, theirs = parameters(), parameters()
    a = AdamW(ours, lr, betas, eps, weight_decay)
    b = torch.optim.AdamW(theirs, lr, betas, eps, weight_decay, foreach=False)
    for seed in range(8):
        set_gradients(ours, theirs, seed)
        a.step()
        b.step()
    assert_equal(ours, theirs, rtol=1e-9, atol=1e-10)
    for p, q in zip(ours, theirs, strict=True):
        assert a.state[p]["step"] == b.state[q]["step"] == 8
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(a.state[p][moment], b.state[q][moment])


def test_adamw_agrees_with_torch_over_hundreds_of_steps_in_float32():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    a, b = AdamW(ours), torch.optim.AdamW(theirs)
    for seed in range(500):
        set_gradients(ours, theirs, seed)
        a.step()
        b.step()
    assert_equal(ours, theirs, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    st.floats(0, 0.5),
    st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    st.floats(0, 0.5),
    st.sampled_from([1, 3, 16, CPU_SLICE]),
)
def test_lion_is_the_papers_algorithm_whatever_the_slice(lr, betas, weight_decay, size):
    ours, expected = parameters(), [p.detach().clone() for p in parameters()]
    moments = [torch.zeros_like(p) for p in expected]
    optimizer = Lion(ours, lr, betas, weight_decay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.optim.optimizers, "CPU_SLICE", size)
        for seed in range(4):
            set_gradients(ours, ours, seed)
            optimizer.step()
            for p, x, m in zip(ours, expected, moments, strict=True):  # Chen et al. 2023, algorithm 2
                c = betas[0] * m + (1 - betas[0]) * p.grad
                x.sub_(lr * (c.sign() + weight_decay * x))
                m.mul_(betas[1]).add_((1 - betas[1]) * p.grad)
    assert_equal(ours, expected, rtol=1e-9, atol=1e-10)


def test_sgd_decays_its_step_with_the_root_of_time():
    (p,) = [nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))]
    optimizer, expected = SGD([p], lr=0.3), p.detach().clone()
    for t in range(20):
        p.grad = torch.full_like(p, t + 1.0)
        optimizer.step()
        expected -= 0.3 / math.sqrt(t + 1) * (t + 1)
    torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("make", [SGD, AdamW, Lion])
def test_updates_in_place(make):
    ps = parameters()
    before = [p.data_ptr() for p in ps]
    optimizer = make(ps)
    pointers = []
    for seed in range(2):
        set_gradients(ps, ps, seed)
        optimizer.step()
        pointers.append([t.data_ptr() for p in ps for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)])
    assert [p.data_ptr() for p in ps] == before
    assert pointers[0] == pointers[1]


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_frozen_parameters_stay_and_have_no_state(make):
    ps = parameters()
    optimizer = make(ps)
    set_gradients(ps, ps, 0)
    ps[0].grad = None
    frozen = ps[0].detach().clone()
    optimizer.step()
    assert torch.equal(ps[0], frozen)
    assert not optimizer.state.get(ps[0])
    set_gradients(ps, ps, 1)  # thawed: its own count starts now
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in ps] == [1, 2, 2, 2, 2]


def test_groups_have_their_own_settings():
    ours, theirs = parameters(), parameters()
    groups = [
        lambda ps: {"params": ps[:2], "lr": 0.1, "weight_decay": 0.0},
        lambda ps: {"params": ps[2:], "betas": (0.5, 0.6)},
    ]
    a, b = AdamW([g(ours) for g in groups]), torch.optim.AdamW([g(theirs) for g in groups])
    for seed in range(5):
        set_gradients(ours, theirs, seed)
        a.step()
        b.step()
    assert_equal(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_torch_scheduler_drives_the_learning_rate():
    ours, theirs = parameters(), parameters()
    a, b = AdamW(ours, 0.1), torch.optim.AdamW(theirs, 0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (a, b)]
    for seed in range(6):
        set_gradients(ours, theirs, seed)
        for optimizer, schedule in zip((a, b), schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert_equal(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [SGD, AdamW, Lion])
def test_closure_runs_with_gradients_and_its_loss_comes_back(make):
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = make([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert p.item() < 3.0
    assert optimizer.step() is None


@pytest.mark.parametrize("make", [SGD, AdamW, Lion])
def test_state_dict_round_trip_continues_bit_for_bit(make, tmp_path):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    a = make(ours, lr=0.05)
    for seed in range(3):
        set_gradients(ours, theirs, seed)
        a.step()
    torch.save([a.state_dict(), [p.detach() for p in ours]], tmp_path / "state.pt")
    state, values = torch.load(tmp_path / "state.pt", weights_only=True)
    b = make(theirs)
    b.load_state_dict(state)
    for q, value in zip(theirs, values, strict=True):
        q.data.copy_(value)
    for seed in range(3, 6):
        set_gradients(ours, theirs, seed)
        a.step()
        b.step()
    assert_equal(ours, theirs, rtol=0, atol=0)
    assert b.param_groups[0]["lr"] == 0.05
    assert all(isinstance(s.get("step", 0), int) for s in b.state.values())


@pytest.mark.parametrize("make", [SGD, AdamW, Lion])
def test_a_copied_optimizer_goes_its_own_way(make):
    model = nn.Linear(3, 2)
    model.optimizer = make(model.parameters())
    twin = copy.deepcopy(model)
    twin(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    twin.optimizer.step()
    assert torch.equal(model.weight, before)
    assert not torch.equal(twin.weight, before)


@pytest.mark.parametrize("make", [SGD, AdamW, Lion])
def test_sparse_gradients_are_refused(make):
    table = nn.Embedding(10, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match=r"gradient layout = torch\.sparse_coo"):
        make(table.parameters()).step()


@pytest.mark.parametrize("make", [SGD, AdamW, Lion])
def test_parameters_and_gradients_that_are_not_contiguous(make):
    ours, theirs = [nn.Parameter(torch.randn(6, 4).t())], [nn.Parameter(torch.empty(4, 6))]
    theirs[0].data.copy_(ours[0].data)
    a, b = make(ours, lr=0.05), make(theirs, lr=0.05)
    for seed in range(3):
        set_gradients(ours, theirs, seed)
        ours[0].grad = ours[0].grad.clone() if seed else torch.randn(1, 1).expand(4, 6)
        theirs[0].grad = ours[0].grad.contiguous()
        a.step()
        b.step()
    assert_equal(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_mixed_dtypes(dtype):
    ours, theirs = parameters(dtype)[:2] + parameters(torch.float32)[2:], None
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a, b = AdamW(ours, eps=1e-4), torch.optim.AdamW(theirs, eps=1e-4)
    for seed in range(5):
        set_gradients(ours, theirs, seed)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=4 * torch.finfo(p.dtype).eps, atol=4 * torch.finfo(p.dtype).eps)


def test_adamw_refuses_what_is_not_real_floating_point():
    with pytest.raises(ConfigError, match=r"parameter dtype = torch\.complex64"):
        AdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1e-3}, r"lr = -0.001: must be a number in \[0, inf\)"),
        ({"lr": math.nan}, "lr = nan"),
        ({"lr": math.inf}, "lr = inf"),
        ({"lr": "1e-3"}, "lr = '1e-3'"),
        ({"lr": True}, "lr = True"),
        ({"betas": (1.0, 0.999)}, r"betas\[0\] = 1.0: must be a number in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] = -0.1"),
        ({"betas": 0.9}, "betas = 0.9: must be a pair"),
        ({"betas": (0.9, 0.99, 0.999)}, "must be a pair"),
        ({"eps": -1e-8}, "eps = -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        AdamW(parameters(), **change)
    with pytest.raises(ConfigError, match=message):  # a group is held to the same
        AdamW([{"params": parameters(), **change}])
    if "lr" in change:
        with pytest.raises(ConfigError, match=message):
            SGD(parameters(), **change)


def step_events(optimizer, ps):
    set_gradients(ps, ps, 0)
    optimizer.step()
    return [nbytes for _, nbytes in allocator_events(optimizer.step)]


def test_a_step_allocates_nothing_but_a_count_or_one_scratch():
    ps = [nn.Parameter(torch.randn(n)) for n in (1000, 10)]
    assert step_events(SGD(ps), ps) == []
    assert step_events(AdamW(ps), ps) == [4, -4]
    events = step_events(Lion(ps), ps)
    assert events[0] == 4 * 1000 == -events[-1]  # as the largest parameter
    assert max(accumulate(events)) == 4 * 1000 + 8 + 4  # a Python number is a float64 and then a float32 for a moment
    assert sum(events) == 0
    big = [nn.Parameter(torch.randn(CPU_SLICE + 1000)), *ps]
    assert step_events(Lion(big), big)[0] == 4 * CPU_SLICE


def test_shards_of_distributed_tensors(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = nn.Parameter(torch.randn(6, 4))
        sharded = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
        a, b = AdamW([sharded]), AdamW([whole])
        for _ in range(2):
            whole.grad = torch.randn(6, 4)
            sharded.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
            a.step()
            b.step()
        assert torch.equal(sharded.full_tensor(), whole)
        assert type(a.state[sharded]["exp_avg"]) is type(sharded.data)
    finally:
        dist.destroy_process_group()
