"""The operations between products, on every instruction set, against what modules compute."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sparity.engine.kernels import native
from sparity.engine.kernels.step import cpu, reference

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
BFLOAT16 = torch.bfloat16
LAST_PLACE = 2.0**-8  # of a bfloat16, relative


def random(*shape, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BFLOAT16)


def unwritten(*shape):
    return torch.full(shape, float("nan"), dtype=BFLOAT16)


def close(found, wanted):
    """Equal up to the last place, which another order of float32 sums may turn over."""
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2 * LAST_PLACE, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("columns", [1, 15, 16, 63, 100, 2048])
@pytest.mark.parametrize("tokens", [1, 3])
def test_norm_and_sum(isa, tokens, columns):
    x, add, weight = random(tokens, columns), random(tokens, columns, seed=1), random(columns, seed=2)
    for addend in (None, add):
        wanted_sum, wanted = reference.rms_norm(x, addend, weight, 1e-5)
        stream, out = x.clone(), unwritten(tokens, columns)
        cpu.rms_norm(stream, addend, weight, 1e-5, out)
        assert torch.equal(stream, wanted_sum)
        close(out, wanted)


def test_norm_by_hand():
    x = torch.tensor([[3.0, 4.0]]).to(BFLOAT16)  # rms: sqrt(12.5)
    out = unwritten(1, 2)
    cpu.rms_norm(x, x.clone(), torch.tensor([1.0, 2.0]).to(BFLOAT16), 0.0, out)
    assert x.tolist() == [[6.0, 8.0]]
    close(out, torch.tensor([[6 / 50**0.5, 16 / 50**0.5]]))


def test_a_norm_of_infinity_is_no_number(isa):
    x, out = torch.tensor([[1.0, float("inf")]]).to(BFLOAT16), unwritten(1, 2)
    cpu.rms_norm(x, None, torch.ones(2, dtype=BFLOAT16), 1e-5, out)
    assert out[0, 0] == 0
    assert out[0, 1].isnan()


@given(st.integers(1, 300), st.floats(0.01, 100), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_gate_is_what_modules_compute(count, scale, seed):
    gates, ups, out = random(count, seed=seed, scale=scale), random(count, seed=seed + 1), unwritten(count)
    cpu.gate(gates, ups, out)
    close(out, reference.gate(gates, ups))


def test_gate_at_the_ends(isa):
    values = torch.tensor([0.0, -0.0, 1e30, -1e30, 100.0, -100.0, float("inf"), float("nan"), 1e-30]).to(BFLOAT16)
    out = unwritten(len(values))
    cpu.gate(values, torch.ones_like(values), out)
    close(out, reference.gate(values, torch.ones_like(values)))


def attention(tokens, kv_heads, group, width, length, capacity, seed=0):
    heads = cpu.Heads(kv_heads * group, kv_heads, width, width**-0.5)
    q, k, v = (random(tokens, n * width, seed=seed + i) for i, n in enumerate((heads.heads, kv_heads, kv_heads)))
    angles = torch.rand(tokens, width, generator=torch.Generator().manual_seed(seed)) * 6
    tables = angles.cos().to(BFLOAT16), angles.sin().to(BFLOAT16)
    keys, values = (unwritten(tokens, kv_heads, capacity, width) for _ in range(2))
    keys[:, :, :length] = random(tokens, kv_heads, length, width, seed=seed + 4)
    values[:, :, :length] = random(tokens, kv_heads, length, width, seed=seed + 5)
    return heads, q, k, v, tables, keys, values


def check(found, heads, q, k, v, tables, keys, values, length, visible):
    """The cache holds the new key and value, and `found` is attention over all, up to rounding."""
    shaped = (-1, heads.kv_heads, heads.width)
    assert torch.equal(keys[:, :, length], reference.rotate(k.view(shaped), *tables))
    assert torch.equal(values[:, :, length], v.view(shaped))
    turned = reference.rotate(q.view(len(q), heads.heads, heads.width), *tables)
    seen = None if visible is None else visible.bool()
    wanted = reference.attend(turned, keys[:, :, : length + 1], values[:, :, : length + 1], heads.scale, seen)
    largest = values[:, :, : length + 1].abs().max().double()
    assert ((found.view_as(wanted).double() - wanted).abs() <= LAST_PLACE * wanted.abs() + 1e-4 * largest).all()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 13])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 130])
def test_attention(isa, group, length):
    parts = attention(2, 3, group, 48, length, length + 5)
    out = unwritten(2, parts[0].heads * 48)
    cpu.attend(*parts, length, None, out)
    check(out, *parts, length, None)
    assert parts[-1][:, :, length + 1 :].isnan().all()  # nothing is written behind the new key


@given(st.integers(1, 4), st.integers(0, 140), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_attention_passes_over_what_is_not_visible(tokens, length, threads, seed):
    parts = attention(tokens, 2, 2, 32, length, length + 1, seed)
    visible = (torch.rand(tokens, length + 1, generator=torch.Generator().manual_seed(seed)) < 0.5).to(torch.uint8)
    visible[:, -1] = 1
    out = unwritten(tokens, parts[0].heads * 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        cpu.attend(*parts, length, visible, out)
    finally:
        torch.set_num_threads(before)
    check(out, *parts, length, visible)


def test_a_token_that_sees_nothing_gives_zeros(isa):
    parts = attention(1, 1, 1, 16, 3, 4)
    out = unwritten(1, 16)
    cpu.attend(*parts, 3, torch.zeros(1, 4, dtype=torch.uint8), out)
    assert (out == 0).all()


def test_heads_may_be_normed_first(isa):
    heads, q, k, v, tables, keys, values = attention(1, 2, 2, 32, 5, 8)
    query_norm, key_norm = random(32, seed=8), random(32, seed=9)
    normed = cpu.Heads(4, 2, 32, heads.scale, query_norm, key_norm, 1e-6)
    out = unwritten(1, 128)
    cpu.attend(normed, q, k, v, tables, keys, values, 5, None, out)
    q, k = (
        reference.rms_norm(x.view(-1, 32), None, weight, 1e-6)[1].view(1, -1)
        for x, weight in ((q, query_norm), (k, key_norm))
    )
    check(out, heads, q, k, v, tables, keys, values, 5, None)
