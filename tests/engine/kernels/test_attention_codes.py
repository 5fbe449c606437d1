"""Attention over codes of a few bits without unpacking the cache, and the pages that are worth reading."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sparity.engine.kernels import native
from sparity.engine.kernels.attention import cpu, reference
from sparity.engine.kernels.attention.cpu import Chosen, Codes, Slots

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")


def packed(codes, bits):
    """uint8 `[..., n]` -> `[..., n * bits / 8]`, the lowest bits first, plainly."""
    each = 8 // bits
    found = torch.zeros(*codes.shape[:-1], codes.shape[-1] // each, dtype=torch.uint8)
    for part in range(each):
        found |= codes[..., part::each] << (part * bits)
    return found


class Coded:
    """Two heads of groups that hold 1 to 32 tokens, as they do after an eviction."""

    def __init__(self, bits, width, channels, dtype=torch.float32, groups=(40, 3), seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.counts = torch.randint(1, 33, (sum(groups),), generator=generator, dtype=torch.int32)
        self.groups, self.bits = groups, bits
        ends = self.counts.cumsum(0)
        held = torch.tensor([int(self.counts[: groups[0]].sum()), int(self.counts[groups[0] :].sum())])
        codes = [
            torch.randint(0, 2**bits, (int(ends[-1]), width), generator=generator, dtype=torch.uint8) for _ in range(2)
        ]
        group_of = torch.repeat_interleave(torch.arange(sum(groups)), self.counts.long())
        scale = 4 / 2**bits
        steps, minima = (torch.rand(sum(groups), width, generator=generator).to(dtype) * each for each in (scale, -2))
        own = torch.rand(2, int(ends[-1]), width // channels, generator=generator).to(dtype)
        self.keys = codes[0] * steps[group_of].double() + minima[group_of].double()
        spread = own.double().repeat_interleave(channels, -1)
        self.values = codes[1] * spread[0] - spread[1]
        self.starts, self.group_of = torch.tensor([0, int(held[0])]), group_of
        of = Codes(
            bits, steps, minima, own[0].contiguous(), -own[1], torch.tensor([0, groups[0]]), torch.tensor(groups),
            self.counts, channels,
        )  # fmt: skip
        self.slots = Slots(packed(codes[0], bits), packed(codes[1], bits), self.starts, held, page=32, codes=of)
        self.q = torch.randn(1, 6, 1, width, generator=generator).to(dtype)

    def parts(self, chosen=None):
        """As the reference takes them; `chosen` groups of each head, or all."""
        found = []
        for head, first in enumerate((0, self.groups[0])):
            last = first + self.groups[head]
            mine = (self.group_of >= first) & (self.group_of < last)
            if chosen is not None:
                mine &= torch.isin(self.group_of, first + chosen[head])
            found.append([(self.keys[mine], self.values[mine], torch.arange(int(mine.sum())), None)])
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "width", "channels"),
    [(8, 8, 8), (8, 64, 32), (4, 16, 16), (4, 128, 32), (2, 32, 32), (2, 64, 32), (2, 128, 64)],
)
def test_codes_are_read_as_the_numbers_they_stand_for(isa, bits, width, channels, dtype):
    case = Coded(bits, width, channels, dtype)
    found = cpu.attend_slots(case.q, [case.slots], 0.1, 5000)
    expected = reference.attend_slots(case.q, case.parts(), 0.1, 5000)
    tolerance = 2e-5 if dtype == torch.float32 else 2**-8
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_are_pages(isa, bits):
    case = Coded(bits, 64, 32)
    chosen = [torch.tensor([0, 7, 8, 39]), torch.tensor([2])]
    pages = Chosen(torch.cat(chosen).int(), torch.tensor([4, 5]))
    slots = Slots(**{**vars(case.slots), "chosen": pages})
    found = cpu.attend_slots(case.q, [slots], 0.1, 5000)
    assert torch.allclose(found.double(), reference.attend_slots(case.q, case.parts(chosen), 0.1, 5000), atol=2e-5)


def test_codes_and_the_last_tokens_are_one_softmax(isa):
    case = Coded(4, 64, 32)
    keys, values = (torch.randn(20, 64, generator=torch.Generator().manual_seed(3 + i)) for i in range(2))
    recent = Slots(keys, values, torch.tensor([0, 13]), torch.tensor([13, 7]))
    parts = case.parts()
    for own, cut in zip(parts, (slice(0, 13), slice(13, 20)), strict=True):
        own.append((keys[cut].double(), values[cut].double(), torch.arange(cut.stop - cut.start), None))
    found = cpu.attend_slots(case.q, [case.slots, recent], 0.1, 5000)
    assert torch.allclose(found.double(), reference.attend_slots(case.q, parts, 0.1, 5000), atol=2e-5)


def test_pages_chosen_by_hand(isa):
    low = torch.zeros(4, 8)
    high = torch.zeros(4, 8)
    low[:, 0], high[:, 0] = torch.tensor([-3.0, -1.0, 0.0, -2.0]), torch.tensor([1.0, 2.0, 4.0, 4.0])
    q = torch.zeros(1, 1, 2, 8)
    q[..., 0] = torch.tensor([1.0, -2.0])  # bounds 1 2 4 4 and 6 2 0 4; the largest 6 2 4 4, the mean 3.5 2 2 4
    of = (torch.tensor([0]), torch.tensor([4]))
    nothing, two = torch.tensor([0]), torch.tensor([2])

    def chosen(ends=(nothing, nothing), **more):
        return cpu.choose_pages(q, low, more.pop("high", high), *of, ends, two, **more).pages.tolist()

    assert chosen() == [0, 3]  # of equal ones the one further back
    assert chosen(mean=True) == [0, 3]
    assert chosen((torch.tensor([2]), nothing)) == [0, 1]
    assert chosen((nothing, torch.tensor([2]))) == [2, 3]
    assert chosen(high=None) == [0, 3]  # means: -3, -1, 0, -2 and 6, 2, 0, 4
    q[..., 1, 0] = 0.0
    assert chosen(high=None) == [2, 3]  # 0, 0, 0, 0 is the largest of all


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=2, max_size=2),
    group=st.integers(1, 6),
    ends=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    wanted=st.integers(0, 100),
    mean=st.booleans(),
    levels=st.sampled_from([0, 15]),
    level=st.sampled_from(native.instruction_sets() or ["scalar"]),
    seed=st.integers(0, 99),
)
def test_pages_are_those_worth_most(lengths, group, ends, wanted, mean, levels, level, seed):
    generator = torch.Generator().manual_seed(seed)
    # small whole numbers: bounds are exact, and many are equal
    low, other = (torch.randint(-3, 4, (200, 16), generator=generator).float() for _ in range(2))
    high = other.abs() if levels else low + other.abs()
    q = torch.randint(-3, 4, (2, 1, group, 16), generator=generator).float()
    starts, count = torch.tensor([2, 100]), torch.tensor(lengths)
    given_ends = tuple(torch.tensor([each, each]) for each in ends)
    with native.using(level):
        found = cpu.choose_pages(
            q, low, high, starts, count, given_ends, torch.tensor([wanted, wanted]), mean=mean, levels=levels
        )
    for pair, pages in enumerate(found.pages.tensor_split(found.ends[:-1])):
        cut = slice(int(starts[pair]), int(starts[pair]) + lengths[pair])
        top = low[cut] + levels * high[cut] if levels else high[cut]
        bounds = torch.maximum(q[pair, 0][:, None] * low[cut], q[pair, 0][:, None] * top).sum(-1)
        worth = bounds.sum(0) / group if mean else bounds.amax(0)
        expected = reference.choose_pages(worth, *ends, wanted)
        assert pages.tolist() == expected.tolist()
