"""Attention by blocks on every instruction set, against float64 with every mask spelled out."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sparity.engine.kernels import native
from sparity.engine.kernels.attention_blocks import cpu, reference
from sparity.errors import InvalidInput

pytestmark = pytest.mark.skipif(cpu.declines(torch.float32, 16, 16) is not None, reason="no compiled kernels")
ALL = pytest.mark.parametrize("isa", native.instruction_sets())


def case(new, tokens, block, widths=(32, 48), dtype=torch.float32, rows=2, heads=4, kv_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, heads, new, widths[0]), (rows, kv_heads, tokens, widths[0]), (rows, kv_heads, tokens, widths[1])
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    blocks = -(-new // block[0]), -(-tokens // block[1])
    kept = torch.rand(rows, heads, *blocks, generator=generator) > 0.5
    return 3 * q, k, v, kept


def check(states, block, pads=None, **more):
    q, k, v, kept = states
    found = cpu.attend_blocks(q, k, v, kept, block, q.shape[-1] ** -0.5, pads=pads, **more).transpose(1, 2)
    expected = reference.attend_blocks(q, k, v, kept, block, q.shape[-1] ** -0.5, pads=pads, **more)
    for row, pad in enumerate(pads or ()):  # queries of padding give 0
        expected[row, :, : max(pad - (k.shape[2] - q.shape[2]), 0)] = 0
    tolerance = 1e-5 if q.dtype == torch.float32 else 2**-7
    assert found.dtype == q.dtype
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
    return found


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(64, 64), (8, 16), (5, 3), (100, 140)])
def test_every_mask_gives_masked_dense_attention(isa, dtype, block):
    with native.using(isa):
        check(case(130, 150, block, dtype=dtype), block)
        check(case(70, 90, block, (16, 80), dtype), block, pads=[0, 40])
        drains = torch.randn(4, generator=torch.Generator().manual_seed(1))
        check(case(33, 33, block, dtype=dtype), block, pads=[3, 30], cap=2.0, drains=drains)


@ALL
def test_all_blocks_are_dense_attention(isa):
    q, k, v, kept = case(150, 150, (64, 64), (64, 64))
    kept[:] = True
    with native.using(isa):
        found = check((q, k, v, kept), (64, 64))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(found, dense, atol=1e-5)


@ALL
def test_blocks_that_are_left_out_are_not_read(isa):
    q, k, v, kept = case(64, 64, (16, 16))
    kept[:, :, :, 1] = False
    kept[:, :, :, 0] = True
    expected = reference.attend_blocks(q, k, v, kept, (16, 16), 32**-0.5)
    k[:, :, 16:32], v[:, :, 16:32] = torch.nan, torch.nan
    with native.using(isa):
        found = cpu.attend_blocks(q, k, v, kept, (16, 16), 32**-0.5).transpose(1, 2)
    assert torch.allclose(found.double(), expected, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(new=st.integers(1, 90), before=st.integers(0, 90), side=st.integers(1, 80), other=st.integers(1, 80))
def test_any_sizes(new, before, side, other):
    check(case(new, new + before, (side, other), (16, 16)), (side, other))


def test_threads_rows_and_how_tensors_lie_change_no_bit():
    q, k, v, kept = case(100, 120, (32, 32), dtype=torch.bfloat16)
    one, threads = check((q, k, v, kept), (32, 32)), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(check((q, k, v, kept), (32, 32)), one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(check([x[1:] for x in (q, k, v, kept)], (32, 32))[0], one[1])
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(check((*turned, kept), (32, 32)), one)


def test_what_the_library_does_not_take_is_declined():
    assert "no multiple of 16" in cpu.declines(torch.float32, 24, 16)
    assert "not float32 or bfloat16" in cpu.declines(torch.float16, 32, 32)
    with pytest.raises(InvalidInput, match="refused heads of 24"):
        cpu.attend_blocks(*case(8, 8, (4, 4), (24, 16)), (4, 4), 1.0)
