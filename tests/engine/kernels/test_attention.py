"""Attention over the cache on every instruction set: chunks, ragged lengths, masks and mass, against the reference."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sparity.engine.kernels import native
from sparity.engine.kernels.step import cpu, reference
from sparity.errors import InvalidInput

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
BFLOAT16 = torch.bfloat16
LAST_PLACE = 2.0**-8  # of a bfloat16, relative


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BFLOAT16)


class Case:
    """New tokens of some rows, and a cache whose rows and heads have lengths of their own."""

    def __init__(self, lengths, fresh, group, width, seed=0, room=5):
        self.lengths, self.fresh = torch.tensor(lengths), torch.tensor(fresh)  # [rows, kv_heads], [rows]
        rows, kv_heads = self.lengths.shape
        tokens, capacity = int(self.fresh.sum()), int(self.lengths.max() + self.fresh.max()) + room
        self.heads = cpu.Heads(kv_heads * group, kv_heads, width, width**-0.5)
        self.q, self.k, self.v = (
            random(tokens, n * width, seed=seed + i) for i, n in enumerate((kv_heads * group, kv_heads, kv_heads))
        )
        angles = torch.rand(tokens, width, generator=torch.Generator().manual_seed(seed)) * 6
        self.tables = angles.cos().to(BFLOAT16), angles.sin().to(BFLOAT16)
        self.keys, self.values = (
            torch.full((rows, kv_heads, capacity, width), float("nan"), dtype=BFLOAT16) for _ in range(2)
        )
        for row in range(rows):
            for head in range(kv_heads):
                held = self.lengths[row, head]
                self.keys[row, head, :held] = random(held, width, seed=seed + 9 * row + head)
                self.values[row, head, :held] = random(held, width, seed=seed + 9 * row + head + 99)
        self.mass = torch.zeros(rows, kv_heads, capacity)

    def run(self, visible=None, mass=False, heads=None, fresh=True):
        """Attend: what comes out."""
        view = cpu.CacheView(self.keys, self.values, self.lengths, self.mass if mass else None)
        out = torch.full_like(self.q, float("nan"))
        cpu.attend(
            heads or self.heads,
            self.q,
            self.k,
            self.v,
            self.tables,
            view,
            out,
            self.fresh if fresh else None,
            visible,
        )
        return out

    def check(self, found, visible=None):
        """The cache holds the new tokens and nothing beyond, and `found` is right up to rounding; gives the mass."""
        heads = self.heads
        turned = reference.rotate(self.q.view(-1, heads.heads, heads.width), *self.tables)
        new_keys = reference.rotate(self.k.view(-1, heads.kv_heads, heads.width), *self.tables)
        new_values = self.v.view(-1, heads.kv_heads, heads.width)
        found, mass, token = found.view_as(turned), torch.zeros_like(self.mass, dtype=torch.float64), 0
        groups = found.view(len(found), heads.kv_heads, -1, heads.width)
        for row, fresh in enumerate(self.fresh.tolist()):
            for at in range(fresh):
                for head in range(heads.kv_heads):
                    length = int(self.lengths[row, head]) + at + 1
                    keys, values = self.keys[row, head], self.values[row, head]
                    assert torch.equal(keys[length - 1], new_keys[token, head])
                    assert torch.equal(values[length - 1], new_values[token, head])
                    assert keys[int(self.lengths[row, head]) + fresh :].isnan().all()
                    seen = torch.ones(1, length, dtype=torch.bool)
                    if visible is not None:
                        covered = visible[row, :length].bool()
                        seen[0, : len(covered)] = covered
                    query = turned[token].view(heads.kv_heads, -1, heads.width)[head][None]
                    held = keys[None, None, :length], values[None, None, :length]
                    wanted = reference.attend(query, *held, heads.scale, seen)[0]
                    largest = values[:length].abs().max().double()
                    difference = (groups[token, head].double() - wanted).abs()
                    assert (difference <= LAST_PLACE * wanted.abs() + 1e-4 * largest).all()
                    weights = reference.attention_weights(query, held[0], heads.scale, seen)
                    mass[row, head, :length] += weights.sum((0, 1, 2))
                token += 1
        return mass


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 13])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 130])
def test_one_token_of_each_row(isa, group, length):
    case = Case([[length] * 3] * 2, [1, 1], group, 48)
    case.check(case.run(fresh=False))


@pytest.mark.parametrize("threads", [1, 3])
def test_lengths_per_row_and_head_and_chunks(isa, threads):
    case, before = Case([[0, 70], [130, 5], [63, 64]], [3, 0, 66], 3, 32), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = case.run()
    finally:
        torch.set_num_threads(before)
    case.check(found)


@given(
    st.lists(st.lists(st.integers(0, 140), min_size=2, max_size=2), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.integers(1, 7),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_what_is_not_visible_is_passed_over(lengths, fresh, threads, mass, seed):
    fresh = fresh[: len(lengths)]
    case, before = Case(lengths, fresh, 2, 32, seed), torch.get_num_threads()
    visible = (torch.rand(len(lengths), 100, generator=torch.Generator().manual_seed(seed)) < 0.5).to(torch.uint8)
    try:
        torch.set_num_threads(threads)
        found = case.run(visible, mass)
    finally:
        torch.set_num_threads(before)
    wanted = case.check(found, visible)
    if mass:
        torch.testing.assert_close(case.mass.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_chunk_gives_the_bits_of_one_token_after_another(isa):
    together, alone = Case([[70, 3], [0, 64]], [5, 5], 3, 32), Case([[70, 3], [0, 64]], [5, 5], 3, 32)
    found, mass = together.run(mass=True), torch.zeros_like(alone.mass)
    for at in range(5):
        out = torch.empty(2, 6 * 32, dtype=BFLOAT16)
        rows = [at, 5 + at]
        parts = (alone.q[rows], alone.k[rows], alone.v[rows], tuple(table[rows] for table in alone.tables))
        cpu.attend(alone.heads, *parts, cpu.CacheView(alone.keys, alone.values, alone.lengths + at, mass), out)
        assert torch.equal(out, found[rows])
    assert torch.equal(alone.keys.nan_to_num(9), together.keys.nan_to_num(9))
    assert torch.equal(mass, together.mass)


def test_mass_is_added_to_what_was_there(isa):
    case = Case([[10]], [1], 4, 16)
    case.mass += 1
    wanted = case.check(case.run(mass=True))
    torch.testing.assert_close(case.mass.double(), wanted + 1, rtol=1e-5, atol=1e-6)
    assert abs(float(wanted.sum()) - 4) < 1e-9  # every query head gives a weight of 1 away


def test_a_token_that_sees_nothing_gives_zeros_and_no_mass(isa):
    case = Case([[3]], [2], 1, 16)
    assert (case.run(torch.zeros(1, 5, dtype=torch.uint8), mass=True) == 0).all()
    assert (case.mass == 0).all()


def test_heads_may_be_normed_first(isa):
    case = Case([[5, 5]], [1], 2, 32)
    query_norm, key_norm = random(32, seed=8), random(32, seed=9)
    found = case.run(heads=cpu.Heads(4, 2, 32, case.heads.scale, query_norm, key_norm, 1e-6))
    case.q, case.k = (
        reference.rms_norm(x.view(-1, 32), None, weight, 1e-6)[1].view(1, -1)
        for x, weight in ((case.q, query_norm), (case.k, key_norm))
    )
    case.check(found)


def test_types_that_are_not_built_are_refused(monkeypatch):
    case, write = Case([[5]], [1], 1, 16), cpu.CacheView.write

    def quantised(view, cache):
        write(view, cache)
        cache.type = 1

    monkeypatch.setattr(cpu.CacheView, "write", quantised)
    with pytest.raises(InvalidInput, match="refused a cache"):
        case.run()
    assert case.keys[0, 0, 5:].isnan().all()
