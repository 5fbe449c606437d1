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
