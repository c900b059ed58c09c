"""The caching allocator's rules on cases whose answer PyTorch's source gives, and what must hold for any sequence."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import estimator as est
from estimator.memory.allocator import CachingAllocator

pytestmark = pytest.mark.quick
MIB = 2**20


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB left over is not split off: kSmallSize must be exceeded
        (12 * MIB + 1, 12 * MIB + 512, 14 * MIB),
    ],
)
def test_one_request(nbytes, allocated, reserved):
    a = CachingAllocator()
    a.allocate(nbytes)
    assert (a.allocated, a.reserved) == (allocated, reserved)


def test_a_split_segment_serves_others_and_heals():
    a = CachingAllocator()
    blocks = [a.allocate(4 * MIB) for _ in range(5)]
    assert a.reserved == 20 * MIB
    for block in (blocks[1], blocks[3], blocks[2], blocks[0], blocks[4]):
        a.free(block)
    a.allocate(19 * MIB)
    assert a.reserved == 20 * MIB


def test_expandable_segments_join_what_is_free_with_what_is_added():
    """Two blocks of 30 MiB are no home for one of 50 where each is a segment; one segment grows by a page of 20."""
    for expandable, reserved in ((False, 110 * MIB), (True, 60 * MIB)):
        a = CachingAllocator(expandable=expandable)
        for block in [a.allocate(30 * MIB) for _ in range(2)]:
            a.free(block)
        a.allocate(50 * MIB)
        assert a.reserved == reserved
    a = CachingAllocator(expandable=True)
    first, _, last = (a.allocate(n * MIB) for n in (30, 5, 5))  # 30 and 5 and 5 of two pages
    assert a.reserved == 40 * MIB
    a.free(first)
    a.free(last)
    a.allocate(4 * MIB)  # of the first 30: the end could grow, and so counts as larger
    assert a.reserved == 40 * MIB
    a.allocate(27 * MIB)  # neither 26 nor 5: the 5 at the end and two pages, 45 - 27 = 18 MiB free there
    assert a.reserved == 80 * MIB
    a.allocate(26 * MIB)
    a.allocate(18 * MIB)
    assert a.reserved == 80 * MIB
    a.allocate(1)
    assert a.reserved == 82 * MIB  # small requests have a segment of their own, of pages of 2 MiB


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 30 * MIB), st.integers(0, 4)), max_size=60), st.booleans())
def test_bytes_in_use_are_what_was_asked_for_and_never_more_than_reserved(requests, expandable):
    a, live = CachingAllocator(expandable=expandable), []
    for nbytes, frees in requests:
        live.append(a.allocate(nbytes))
        assert live[-1].nbytes >= nbytes
        for _ in range(min(frees, len(live))):
            a.free(live.pop(len(live) // 2))
        assert a.allocated == sum(b.nbytes for b in live) <= a.reserved
        spans = sorted((b.start, b.start + b.nbytes) for b in live)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_a_step_reserves_what_it_allocates_and_some_more():
    m = est.estimate("gpt2", est.Plan(batch_size=8), "a100-80gb-sxm").memory
    assert m.allocated <= m.reserved <= 1.5 * m.allocated
    assert m.nvidia_smi == (m.reserved + m.context[0], m.reserved + m.context[1])
    assert m.allocated <= m.reserved_expandable <= m.reserved
    assert m.to_dict()["reserved"] == m.reserved


def test_the_notes_say_what_is_whole_and_why_the_driver_shows_more():
    """ZeRO-3 over 64: at the peak the root's parameters, a block's and those of the block that is gathered ahead."""
    m = est.preset("llama-3-70b")
    p = est.Plan(precision="bf16-fsdp", sharding="zero3", data_parallel=64, attention="sdpa", checkpointing="block")
    r = est.estimate(m, p, "h100-80gb-sxm")
    root = 2 * m.vocab_size * m.d_model + m.d_model
    block = (r.values.parameters - root) // m.num_layers
    whole, rest = r.memory.messages
    assert whole == 2 * (root + 2 * block)  # bf16; 64 divides every dimension
    assert whole + rest == r.memory.parts["communication"]
    of_messages, of_driver = r.memory_notes
    assert f"{whole / 2**30:.2f} GiB are parameters" in of_messages
    assert f"{(r.memory.reserved - r.memory.reserved_expandable) / 2**30:.2f} GiB less" in of_driver
