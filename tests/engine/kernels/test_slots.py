"""Products with what lies in slots: the bits of the whole weight in its place, wherever the slots are."""

import pytest
import torch

from kernel_inputs import inputs, weight_for
from sparity.engine.kernels import native
from sparity.engine.kernels.gemv.cpu import gemv
from sparity.engine.kernels.native_weight import NativeWeight
from sparity.engine.kernels.slots import cpu, reference
from sparity.errors import InvalidInput
from sparity.formats import build_format

SHAPES = ((1, 1), (9, 31), (64, 64), (130, 65), (576, 192), (1100, 70))  # units, width


@pytest.fixture
def built():
    reason = cpu.declines(torch.zeros(1, 1).bfloat16(), torch.zeros(1, 1).bfloat16())
    if reason:
        pytest.skip(reason)


def scattered(units, width, share=0.3, seed=0):
    """A weight `[units, width]`, the units that count, where they lie, and a buffer in which nothing else is finite."""
    draw = torch.Generator().manual_seed(seed)
    weight = weight_for("dense", units, width)
    counting = (torch.rand(units, generator=draw) < share).nonzero()[:, 0]
    slots = torch.randperm(units + 5, generator=draw)[: len(counting)]
    part = torch.full((units + 5, width), torch.nan).bfloat16()
    part[slots] = weight[counting]
    return weight, counting, slots, part


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_rows_have_the_bits_that_they_have_among_all(isa, shape, tokens):
    weight, counting, slots, part = scattered(*shape)
    x = inputs(tokens, shape[1])
    whole = gemv(NativeWeight(build_format("dense").pack(weight, "same")), x)
    assert torch.equal(cpu.slot_rows(part, slots, x), whole[:, counting])


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_columns_have_the_bits_of_all_channels_in_their_places(isa, shape, tokens):
    weight, counting, slots, part = scattered(*shape)
    x = torch.zeros(tokens, shape[0]).bfloat16()
    x[:, counting] = inputs(tokens, max(len(counting), 1))[:, : len(counting)]
    whole = gemv(NativeWeight(build_format("columns").pack(weight.T.contiguous(), "same")), x)
    assert torch.equal(cpu.slot_columns(part, slots, counting, x), whole)


@pytest.mark.usefixtures("built")
def test_a_dense_prefix_changes_no_bit():
    weight = weight_for("dense", 40, 96)
    part, x = weight.clone(), inputs(2, 96)
    slots = torch.tensor([3, 0, 1, 2, 5, 4, 30, 20])  # six of the first seven
    assert torch.equal(cpu.slot_rows(part, slots, x, (0, 7)), cpu.slot_rows(part, slots, x))
    assert torch.equal(cpu.slot_rows(part, slots[-2:], x, (0, 7)), cpu.slot_rows(part, slots[-2:], x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_reference_by_hand(dtype):
    part = torch.tensor([[9.0, 9.0], [1.0, 2.0], [3.0, -4.0]], dtype=dtype)  # units 0 and 2 of three in slots 2 and 1
    slots = torch.tensor([2, 1], dtype=torch.int32)
    x = torch.tensor([[1.0, 10.0]], dtype=dtype)
    assert reference.slot_rows(part, slots, x).tolist() == [[-37.0, 21.0]]
    inner = torch.tensor([[2.0, 0.0, 0.5]], dtype=dtype)
    assert reference.slot_columns(part, slots, torch.tensor([0, 2]), inner).tolist() == [[6.5, -7.0]]
    assert reference.slot_rows(part, slots[:0], x).shape == (1, 0)


def test_the_reference_and_the_kernels_agree(built):
    _, counting, slots, part = scattered(300, 128)
    x, inner = inputs(2, 128), torch.zeros(2, 300).bfloat16()
    inner[:, counting] = inputs(2, len(counting))
    for found, wanted in (
        (cpu.slot_rows(part, slots, x), reference.slot_rows(part, slots, x)),
        (cpu.slot_columns(part, slots, counting, inner), reference.slot_columns(part, slots, counting, inner)),
    ):
        assert torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=1e-3 * float(wanted.abs().max()))


def test_what_does_not_fit_is_refused(built):
    part, x = torch.zeros(4, 8).bfloat16(), torch.ones(1, 8).bfloat16()
    with pytest.raises(InvalidInput, match="slots below 4"):
        cpu.slot_rows(part, torch.tensor([4]), x)
    inner = torch.ones(1, 3).bfloat16()
    with pytest.raises(InvalidInput, match="a channel that is not in memory"):
        cpu.slot_columns(part, torch.tensor([0, 1]), torch.tensor([0, 2]), inner)
    with pytest.raises(InvalidInput, match="2 slots for 1 units"):
        cpu.slot_columns(part, torch.tensor([0, 1]), torch.tensor([0]), inner)


def test_reasons_are_sentences(monkeypatch):
    part = torch.zeros(4, 8)
    monkeypatch.setattr(native, "unavailable", lambda: None)
    assert cpu.declines(part, part) == "kernels take bfloat16"
    assert cpu.declines(part.bfloat16(), torch.zeros(17, 8).bfloat16()) == "kernels take at most 16 tokens"
    monkeypatch.setattr(native, "unavailable", lambda: "they were not built")
    assert cpu.declines(part, part) == "they were not built"
