import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import trainer.model.loss
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from trainer.model.loss import CPU_TILE, chunked_cross_entropy, cross_entropy
from trainer.referee.measure import allocator_events, build_step, loss_of

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3)
seeds = st.integers(0, 2**32)
vocabularies = st.integers(1, 70)
tiles = st.sampled_from([1, 7, 64, 200, CPU_TILE])  # less than a row, a few rows, everything


@pytest.fixture
def tile(monkeypatch):
    return lambda elements: monkeypatch.setattr(trainer.model.loss, "CPU_TILE", elements)


def both(x, targets, weight=1.0):
    """Loss and gradient of ours, and of F.cross_entropy on the same numbers in float64."""
    ours = x.detach().requires_grad_()
    theirs = x.detach().double().requires_grad_()
    a = cross_entropy(ours, targets)
    b = F.cross_entropy(theirs.reshape(-1, x.shape[-1]), targets.reshape(-1).long())
    (weight * a).backward()
    (weight * b).backward()
    return a.detach(), b.detach(), ours.grad, theirs.grad


@settings(deadline=None)
@given(
    st.tuples(shapes, vocabularies, tiles), st.sampled_from(list(TOLERANCE)), st.integers(0, 2**32), st.floats(-3, 3)
)
def test_agrees_with_torch_in_value_and_gradient(sizes, dtype, seed, weight):
    shape, V, elements = sizes
    g = torch.Generator().manual_seed(seed)
    x = (10 * torch.randn(*shape, V, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(V, shape, generator=g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.model.loss, "CPU_TILE", elements)
        a, b, da, db = both(x, targets, weight)
    assert a.dtype == da.dtype == dtype
    assert a.ndim == 0
    assert da.shape == x.shape
    torch.testing.assert_close(a.double(), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(da.double(), db, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("elements", [16, CPU_TILE])
def test_gradient_is_the_limit_of_differences(tile, elements):
    tile(elements)
    x = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (3, 4))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [16, 100, CPU_TILE])
def test_half_precision_is_worked_on_in_float32(tile, dtype, elements):
    tile(elements)
    x = (5 * torch.randn(4, 6, 33)).to(dtype)
    a, b, da, db = both(x, torch.randint(33, (4, 6)))
    assert a.dtype == torch.float32
    assert da.dtype == dtype
    torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    # One rounding: half a unit in the last place of the dtype, or of its least normal number.
    torch.testing.assert_close(da.double(), db, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_for_logits_of_ten_thousand(dtype):
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]], dtype=dtype)
    far = float(x[0, 0] - x[0, 1])  # 2e4, or what bfloat16 makes of it
    log3 = torch.tensor(3.0, dtype=torch.float64).log().item()
    for row, target, expected in ((0, 0, 0.0), (0, 1, far), (1, 0, log3), (2, 2, log3)):
        assert cross_entropy(x[row], torch.tensor(target)).item() == pytest.approx(expected, rel=1e-6)
    x.requires_grad_()
    cross_entropy(x, torch.tensor([1, 0, 2])).backward()
    ninths = 9 * x.grad.double()  # p is (1, 0, 0), then thirds twice; the mean over three rows makes ninths
    exact = torch.tensor([[3, -3, 0], [-2, 1, 1], [1, 1, -2]], dtype=torch.float64)
    torch.testing.assert_close(ninths, exact, rtol=torch.finfo(dtype).eps * 4, atol=0)


def test_masked_words_have_no_probability_and_no_gradient():
    x = torch.tensor([[0.5, float("-inf"), 1.5]])
    a, b, da, db = both(x, torch.tensor([0]))
    torch.testing.assert_close(a.double(), b)
    torch.testing.assert_close(da.double(), db, rtol=1e-6, atol=0)
    assert da[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8])
def test_any_integer_dtype_of_targets(dtype):
    x, targets = torch.randn(5, 7), torch.randint(7, (5,))
    assert cross_entropy(x, targets.to(dtype)) == cross_entropy(x, targets)


def test_logits_that_are_not_contiguous():
    x, targets = torch.randn(6, 11, 4), torch.randint(11, (6, 4))
    a, b, da, db = both(x.transpose(1, 2), targets)
    torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(da.double(), db, rtol=1e-5, atol=1e-7)


def test_leaves_logits_alone_and_runs_without_gradients():
    x, targets = torch.randn(5, 7), torch.randint(7, (5,))
    before = x.clone()
    with torch.no_grad():
        loss = cross_entropy(x, targets)
    assert not loss.requires_grad
    x.requires_grad_()
    again = cross_entropy(x, targets)
    again.backward(retain_graph=True)
    once = x.grad.clone()
    again.backward()
    assert loss == again
    assert torch.equal(x, before)
    assert torch.equal(x.grad, 2 * once)


def test_saves_the_logits_and_two_numbers_a_row():
    x, targets = torch.randn(6, 50, requires_grad=True), torch.randint(50, (6,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(x, targets)
    assert sorted(t.data_ptr() for t in saved[:2]) == sorted((x.data_ptr(), targets.data_ptr()))
    assert [tuple(t.shape) for t in saved[2:]] == [(6,), (6,)]
    assert all(t.untyped_storage().nbytes() == 4 * 6 for t in saved[2:])


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cross_entropy(x, torch.tensor([0, 1])), x, create_graph=True)


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (torch.zeros(2, 5), torch.tensor([0, 5]), ValueError, r"targets = 5: must be in \[0, 5\)"),
        (torch.zeros(2, 5), torch.tensor([-100, 5]), ValueError, "targets = -100"),
        (torch.zeros(2, 5), torch.tensor([0, 1, 2]), ValueError, r"targets.shape = \(3,\)"),
        (torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.int64), ValueError, r"targets.shape = \(2, 1\)"),
        (torch.zeros(()), torch.tensor(0), ValueError, "without its last dimension"),
        (torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), ValueError, "no target"),
        (torch.zeros(2, 5), torch.zeros(2), TypeError, "targets.dtype = torch.float32"),
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.bool), TypeError, "targets.dtype = torch.bool"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1]), TypeError, "logits.dtype = torch.int64"),
    ],
)
def test_refuses(logits, targets, error, message):
    with pytest.raises(error, match=message):
        cross_entropy(logits, targets)


def peak(events):
    live = most = 0
    for nbytes in events:
        live += nbytes
        most = max(most, live)
    return most


def step_events(loss, x, targets):
    def step():
        loss(x, targets).backward()
        x.grad = None

    step()
    return [nbytes for _, nbytes in allocator_events(step)]


@pytest.mark.parametrize(("N", "V"), [(64, 5000), (3, 40), (1, 11), (300, 7)])
def test_never_holds_more_than_torch(N, V):
    x, targets = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    assert peak(step_events(cross_entropy, x, targets)) <= peak(step_events(F.cross_entropy, x, targets))


@pytest.mark.parametrize(("N", "V"), [(64, 5000), (200, 3001)])
def test_backward_holds_one_gradient_and_a_few_rows(N, V):
    x, targets = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    rows, scalars = 4 * N, 64
    events = step_events(cross_entropy, x, targets)
    assert 4 * N * V <= peak(events) <= max(4 * N * V + 4 * rows, 4 * min(N * V, CPU_TILE) + 4 * rows) + scalars
    assert sum(events) == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 4), (3, 13)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_chunked_agrees_with_the_whole(shape, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 16, dtype=torch.float64, generator=generator)
    weight = torch.randn(11, 16, dtype=torch.float64, generator=generator)
    targets = torch.randint(11, shape, generator=generator)
    expected = [t.clone().requires_grad_() for t in (x, weight)]
    mine = [t.to(dtype).requires_grad_() for t in (x, weight)]
    whole = torch.nn.functional.cross_entropy((expected[0] @ expected[1].T).flatten(0, 1), targets.flatten())
    chunked = chunked_cross_entropy(*mine, targets)
    (3 * whole).backward()
    (3 * chunked).backward()
    assert chunked.item() == pytest.approx(whole.item(), rel=tolerance)
    for a, b in zip(mine, expected, strict=True):
        assert (a.grad - b.grad).norm() <= tolerance * b.grad.norm()
    with torch.no_grad():
        assert chunked_cross_entropy(*mine, targets).item() == chunked.item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("rows", [8, 777, 16384])  # the last has chunks of more than FLOAT16_ROWS
def test_chunked_under_autocast_agrees_with_the_whole_in_float64(rows, dtype, tolerance):
    """Within a few roundings of the dtype, 0.4 % and 0.05 %; a scaled loss and the gradients it has, in float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 16, generator=generator)
    weight = torch.randn(51, 16, generator=generator)
    targets = torch.randint(5, (rows,), generator=generator)  # few words have all the rows, as in text
    expected = [t.double().requires_grad_() for t in (x, weight)]
    mine = [t.clone().requires_grad_() for t in (x, weight)]
    whole = torch.nn.functional.cross_entropy(expected[0] @ expected[1].T, targets)
    with torch.autocast("cpu", dtype):
        chunked = chunked_cross_entropy(*mine, targets)
    (2.0**10 * whole).backward()
    (2.0**10 * chunked).backward()
    assert chunked.dtype == torch.float32
    assert chunked.item() == pytest.approx(whole.item(), rel=tolerance)
    for a, b in zip(mine, expected, strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() <= tolerance * b.grad.norm()


def test_chunked_in_float16_keeps_gradients_that_a_mean_would_lose():
    """A probability of 1e-5 over 4096 rows is 2e-9, of which float16 makes 0; the loss scale brings it back."""
    x = torch.ones(4096, 1)
    weight = torch.tensor([[0.0], [-11.5]], requires_grad=True)  # e^-11.5 is 1.0e-5
    with torch.autocast("cpu", torch.float16):
        loss = chunked_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.int64))
    (2.0**16 * loss).backward()
    probability = torch.tensor(-11.5).exp().item()
    assert weight.grad[1].item() / 2.0**16 == pytest.approx(probability, rel=0.01)


def test_the_gradient_of_a_weight_in_float32_is_better_than_its_dtype():
    """Sums of 4096 rows in float32: what bfloat16 rounds is each chunk's part, not each total on the way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 16, generator=generator).bfloat16()
    weight = torch.randn(51, 16, generator=generator).bfloat16()
    targets = torch.randint(51, (4096,), generator=generator)

    def gradient(dtype):
        w = weight.to(dtype).requires_grad_()
        chunked_cross_entropy(x, w, targets).backward()
        return w.grad.double()

    exact = weight.double().requires_grad_()
    torch.nn.functional.cross_entropy(x.double() @ exact.T, targets).backward()
    wide, narrow = ((gradient(dtype) - exact.grad).norm() for dtype in (torch.float32, torch.bfloat16))
    assert wide < 0.8 * narrow


@pytest.mark.parametrize("loss", ["bundled", "torch", "chunked"])
def test_the_loss_of_the_last_positions_is_that_of_their_rows_of_all_logits(loss):
    m = ModelConfig("llama", 2, 24, 4, 31, 13, 2, 6, 40)
    kept, whole = (build_step(m, Plan(batch_size=2, loss=loss, logits_to_keep=n)) for n in (4, None))
    kept.model.load_state_dict(whole.model.state_dict())
    ids, targets = whole.inputs
    mine = loss_of(kept.model, kept.plan, ids, targets[:, -4:].contiguous())
    theirs = torch.nn.functional.cross_entropy(whole.model(ids)[:, -4:].flatten(0, 1), targets[:, -4:].flatten())
    torch.testing.assert_close(mine, theirs)
    for value, said in ((14, "a sequence has 13 tokens"), (0, "must be an integer of at least 1")):
        with pytest.raises(ConfigError, match=said):
            Plan(logits_to_keep=value).kept_logits(m)
    assert Plan(logits_to_keep=13).kept_logits(m) is None
