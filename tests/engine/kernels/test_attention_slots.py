"""Attention over the slots of a cache on every instruction set: ragged heads, pages, places, codes, against float64."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sparity.engine.kernels import native
from sparity.engine.kernels.attention import cpu, reference
from sparity.engine.kernels.attention.cpu import Chosen, Slots
from sparity.errors import InvalidInput

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
INFINITE = float("inf")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """Heads of unlike lengths with NaN between them, and queries of their group."""

    def __init__(self, lengths, group=2, width=32, dtype=torch.float32, rows=1, fresh=1, seed=0, length=None):
        self.lengths, self.rows, self.scale = torch.tensor(lengths), rows, width**-0.5
        self.starts = (self.lengths + 3).cumsum(0) - self.lengths
        slots = int(self.starts[-1] + self.lengths[-1]) + 3
        self.keys, self.values = (torch.full((slots, width), float("nan")).to(dtype) for _ in range(2))
        self.places = torch.full((slots,), -7, dtype=torch.int32)
        self.length = length or max(lengths) + fresh
        for pair, (start, held) in enumerate(zip(self.starts.tolist(), lengths, strict=True)):
            for offset, states in enumerate((self.keys, self.values)):
                states[start : start + held] = random(held, width, seed=seed + 2 * pair + offset).to(dtype)
            self.places[start : start + held] = torch.arange(held)
        self.q = random(rows, len(lengths) // rows * group, fresh, width, seed=seed + 77).to(dtype)

    def slots(self, **more):
        """As the library takes them."""
        return Slots(self.keys, self.values, self.starts, self.lengths, **more)

    def parts(self, tokens=None, added=None):
        """As the reference does; `tokens` of each head are read, or all."""
        found = []
        for pair, (start, held) in enumerate(zip(self.starts.tolist(), self.lengths.tolist(), strict=True)):
            own = torch.arange(start, start + held) if tokens is None else start + tokens[pair]
            found.append([(self.keys[own], self.values[own], self.places[own], None if added is None else added[own])])
        return found

    def check(self, parts=None, slots=None, **more):
        """What the library finds is right."""
        slots = [self.slots()] if slots is None else slots
        found = cpu.attend_slots(self.q, slots, self.scale, self.length, **more)
        if more.get("visible") is not None:
            more = more | {"visible": more["visible"] != 0}
        expected = reference.attend_slots(self.q, parts or self.parts(), self.scale, self.length, **more)
        tolerance = 1e-5 if self.q.dtype == torch.float32 else 2**-8
        assert found.dtype == self.q.dtype
        assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance / 4)
        return found


def test_a_case_worked_by_hand(isa):
    # logits ln 1, ln 3, ln 4 of the first head: weights 1/8, 3/8, 4/8; the second head holds one token
    keys, values = torch.zeros(4, 8), torch.zeros(4, 8)
    keys[:3, 0], values[:, 0] = torch.tensor([1.0, 3.0, 4.0]).log(), torch.tensor([8.0, 16.0, 32.0, 5.0])
    values[1, 7] = 1.0
    q = torch.zeros(1, 2, 1, 8)
    q[..., 0] = 2.0
    found = cpu.attend_slots(q, [Slots(keys, values, torch.tensor([0, 3]), torch.tensor([3, 1]))], 0.5, 4)
    assert torch.allclose(found[0, 0, 0], torch.tensor([23.0, 0, 0, 0, 0, 0, 0, 0.375]), atol=1e-5)
    assert found[0, 1, 0].tolist() == [5.0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("group", "width"), [(1, 16), (2, 32), (3, 64), (5, 80), (8, 128), (18, 16)])
def test_ragged_heads(isa, dtype, group, width):
    case = Case([1, 70, 0, 1025], group, width, dtype, rows=2)
    found = case.check()
    assert torch.equal(found[1, :group], torch.zeros_like(found[1, :group]))  # that head holds nothing


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=2, max_size=2),
    group=st.integers(1, 9),
    width=st.sampled_from([8, 16, 24, 32, 48, 96, 256]),
    fresh=st.integers(1, 3),
    window=st.sampled_from([0, 1, 5, 40]),
    cap=st.sampled_from([0.0, 2.0]),
    drains=st.booleans(),
    masked=st.booleans(),
    level=st.sampled_from(native.instruction_sets() or ["scalar"]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_mask(lengths, group, width, fresh, window, cap, drains, masked, level, seed):
    case = Case(lengths, group, width, rows=2, fresh=fresh, seed=seed, length=160)
    visible = (random(2, 160, seed=seed) > 0).to(torch.uint8) if masked else None
    drain = random(group, seed=seed + 1) if drains else None
    with native.using(level):
        case.check(slots=[case.slots(places=case.places)], window=window, cap=cap, visible=visible, drains=drain)


def test_places_decide_what_is_seen(isa):
    case = Case([6], group=1, length=9)
    case.places[case.starts[0] :][:6] = torch.tensor([0, -1, 3, 8, 9, 2000000000], dtype=torch.int32)
    found = case.check(slots=[case.slots(places=case.places)])
    only = case.parts(tokens=[torch.tensor([0, 2, 3])])
    assert torch.allclose(found.double(), reference.attend_slots(case.q, only, case.scale, 9), atol=1e-6)


def test_numbers_that_are_added_to_logits(isa):
    case = Case([40, 9], group=2)
    added = random(len(case.keys), seed=5) * 3
    added[case.starts[0] + 4] = -INFINITE
    case.check(parts=case.parts(added=added), slots=[case.slots(added=added)])


@pytest.mark.parametrize("page", [1, 16, 1024])
def test_pages_are_read_in_place(isa, page):
    case = Case([2100, 40, 1], group=3)
    pages = [torch.arange(0, -(-held // page), 2) for held in case.lengths.tolist()]
    chosen = Chosen(torch.cat(pages).int(), torch.tensor([len(each) for each in pages]).cumsum(0))
    tokens = [
        torch.cat([torch.arange(p * page, min((p + 1) * page, held)) for p in each.tolist()])
        for each, held in zip(pages, case.lengths.tolist(), strict=True)
    ]
    case.check(parts=case.parts(tokens), slots=[case.slots(page=page, chosen=chosen)])


def test_parts_are_one_softmax(isa):
    case, other = Case([30, 2000], group=2), Case([5, 0], group=2, seed=50)
    joined = [first + second for first, second in zip(case.parts(), other.parts(), strict=True)]
    case.check(parts=joined, slots=[case.slots(), other.slots()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), INFINITE, -INFINITE])
def test_numbers_that_are_not_finite_show_where_they_are_seen(isa, dtype, bad):
    case = Case([2000, 30], group=2, dtype=dtype)
    case.values[case.starts[0] + 1500, 3] = bad
    found = cpu.attend_slots(case.q, [case.slots()], case.scale, case.length)
    assert not bool(found[0, :2, 0, 3].isfinite().any())
    assert bool(found[0, :2, 0, 4:].isfinite().all())
    assert bool(found[0, 2:].isfinite().all())
    case.keys[case.starts[1] + 2] = float("nan")
    found = cpu.attend_slots(case.q, [case.slots()], case.scale, case.length)
    assert bool(found[0, 2:].isnan().all())


def test_logits_far_apart_do_not_overflow(isa):
    case = Case([1500], group=2)
    case.keys[case.starts[0] + 1400] *= 1e4
    case.keys[case.starts[0] + 3] *= -1e4
    assert bool(case.check().isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_other_rows_change_no_bit(isa, dtype):
    case = Case([5000, 3000, 70, 2049], group=4, width=64, dtype=dtype, rows=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpu.attend_slots(case.q, [case.slots()], case.scale, 5001))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    alone = Slots(case.keys, case.values, case.starts[2:].clone(), case.lengths[2:].clone())
    assert torch.equal(cpu.attend_slots(case.q[1:], [alone], case.scale, 5001), found[0][1:])


def test_several_tokens_give_the_bits_of_single_ones(isa):
    case, single = Case([1030, 40], group=3, fresh=5, length=1035), []
    case.places[case.starts[1] :][:40] += 990
    found = cpu.attend_slots(case.q, [case.slots(places=case.places)], case.scale, 1030)
    for at in range(5):
        lengths = case.lengths - 4 + at
        slots = Slots(case.keys, case.values, case.starts, lengths, case.places)
        single.append(cpu.attend_slots(case.q[:, :, at : at + 1], [slots], case.scale, 1026 + at))
    assert torch.equal(found, torch.cat(single, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instruction_sets_agree(dtype):
    case, found = Case([900, 1100], group=4, width=128, dtype=dtype), []
    for level in native.instruction_sets():
        with native.using(level):
            found.append(cpu.attend_slots(case.q, [case.slots()], case.scale, 1101).float())
    for each in found[1:]:
        assert torch.allclose(each, found[0], rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_what_the_library_does_not_take():
    assert cpu.declines(torch.float16, 64, 64) == "the cache holds float16, not float32 or bfloat16"
    assert "of 20 numbers are no multiple of 8" in cpu.declines(torch.float32, 20, 64)
    assert "of 24 numbers are no multiple of 16" in cpu.declines(torch.bfloat16, 64, 24)
    assert "16 channels share a step, no multiple of 32" in cpu.declines(torch.float32, 64, 64, 32, 2, 16)
    assert "pages of 2048 tokens" in cpu.declines(torch.float32, 64, 64, 2048)
    assert cpu.declines(torch.bfloat16, 64, 128, 32, 2, 32) is None
    case = Case([5], width=12)
    with pytest.raises(InvalidInput, match="refused heads of 12"):
        cpu.attend_slots(case.q, [case.slots()], 1.0, 6)
