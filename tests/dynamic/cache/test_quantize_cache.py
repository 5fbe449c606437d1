"""Codes worked out by hand, the bound of the error, and the bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparity
from sparity.errors import InvalidInput, NumericalError


def test_codes_by_hand():
    states = torch.tensor([[0.0, 10.0, 1.0, 7.0], [3.0, 10.0, 2.0, -1.0]])[None, None]
    found = sparity.quantize_cache(states, bits=2, per="channel", group=2)
    assert found.zero[0, 0].tolist() == [[0.0, 10.0, 1.0, -1.0]]
    assert found.scale[0, 0].tolist() == [[1.0, 0.0, pytest.approx(1 / 3), pytest.approx(8 / 3)]]
    assert found.codes[0, 0].tolist() == [[0, 0, 0, 3], [3, 0, 3, 0]]
    assert found.packed[0, 0].tolist() == [[3 << 6], [3 | 3 << 4]]
    found = sparity.quantize_cache(states, bits=4, per="token", group=2)
    assert found.zero[0, 0].tolist() == [[0.0, 1.0], [3.0, -1.0]]
    assert found.scale.flatten().tolist() == pytest.approx([10 / 15, 6 / 15, 7 / 15, 3 / 15])
    assert found.codes[0, 0].tolist() == [[0, 15, 0, 15], [0, 15, 15, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 100), size=st.floats(1e-3, 1e3))
def test_the_error_is_half_a_step_at_most(bits, per, dtype, seed, size):
    states = (torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(seed)) * size + size).to(dtype)
    before = states.clone()
    found = sparity.quantize_cache(states, bits=bits, per=per, group=8)
    assert torch.equal(states, before)
    again = found.dequantize()
    assert again.dtype == dtype
    assert again.shape == states.shape
    assert found.codes.dtype == torch.uint8
    assert int(found.codes.max()) == 2**bits - 1
    steps = found.scale.repeat_interleave(8, 2 if per == "channel" else 3).double()
    rounding = torch.finfo(dtype).eps * states.double().abs().amax() * (2 if dtype == torch.float32 else 4)
    assert bool(
        (
            (again.double() - states.double()).abs() <= steps / 2 * (1 + 2**bits * torch.finfo(dtype).eps) + rounding
        ).all()
    )


def test_bytes_are_freed():
    states = torch.randn(1, 2, 128, 64, dtype=torch.float16)
    for bits in (2, 4, 8):
        found = sparity.quantize_cache(states, bits=bits, per="channel", group=32)
        assert found.packed.nbytes == states.nbytes * bits // 16
        assert found.nbytes == found.packed.nbytes + 2 * 2 * (128 // 32) * 64 * 2


def test_equal_numbers_come_back_as_they_were():
    states = torch.full((1, 1, 4, 8), 1.2345)
    assert torch.equal(sparity.quantize_cache(states, bits=2, per="token", group=8).dequantize(), states)


def test_what_cannot_be_quantised_is_refused():
    states = torch.randn(1, 1, 10, 8)
    for given_, options, words in (
        (states[0], {}, "states must be floating-point"),
        (states, {"bits": 3}, "bits 3 must be 2, 4 or 8"),
        (states, {"per": "head"}, "per 'head' must be channel"),
        (states, {"group": 0}, "group 0 must be a whole number from 1 on"),
        (states, {"group": 4}, "10 tokens do not fill groups of 4: keep the last 2 as they are"),
        (states[..., :3], {"bits": 2}, "3 channels of 2 bits do not fill whole bytes"),
        (states, {"per": "token", "group": 3}, "8 channels do not fill groups of 3"),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.quantize_cache(given_, **{"bits": 4, "per": "channel", "group": 5, **options})
    states[0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="states hold NaN"):
        sparity.quantize_cache(states, bits=4, per="channel", group=5)
