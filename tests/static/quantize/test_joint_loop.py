"""Pruning and rounding in one loop."""

import pytest
import quantize_references as plain
import torch

import references
import sparity
from references import layer
from sparity.errors import InvalidInput
from sparity.static.quantize.grids.integers import Integers

EXACT = {"rtol": 1e-4, "atol": 1e-5}


def test_sparsegpt_rounds_in_the_same_loop():
    weight, inputs = layer(7, 160, tokens=120)
    for bits in (3, 4, 8):
        found, keep = sparity.prune_weight(weight, inputs, solver="sparsegpt", sparsity=0.5, bits=bits)
        expected = plain.sparsegpt_and_bits(weight, inputs, 0.5, bits)
        torch.testing.assert_close(found.double(), expected, **EXACT)
        assert (found[~keep] == 0).all()
        assert max(len(row.unique()) for row in found) <= 2**bits


def test_pruning_and_rounding_in_one_loop_beats_one_after_the_other():
    weight, inputs = layer(16, 128)
    joint, keep = sparity.prune_weight(weight, inputs, solver="sparsegpt", bits=3, pattern="2:4")
    pruned, _ = sparity.prune_weight(weight, inputs, solver="sparsegpt", pattern="2:4")
    after = sparity.quantize_weight(pruned, method="nearest", bits=3, symmetric=False).weight
    errors = [references.output_error(weight, each, inputs) for each in (joint, after)]
    assert errors[0] < 0.9 * errors[1]
    assert (keep.view(16, -1, 4).sum(2) == 2).all()


def test_groups_in_the_joint_loop():
    weight, inputs = layer(6, 64)
    found, _ = sparity.prune_weight(weight, inputs, solver="sparsegpt", bits=2, group=16, symmetric=True)
    assert max(len(part.unique()) for part in found.reshape(-1, 16)) <= 4
    with pytest.raises(InvalidInput, match="weight: a group of 24 does not divide its row of 64 weights"):
        sparity.prune_weight(weight, inputs, solver="sparsegpt", bits=4, group=24)
    for options in ({"group": 16}, {"signed": True}):
        with pytest.raises(InvalidInput, match="give bits too"):
            sparity.prune_weight(weight, inputs, solver="sparsegpt", **options)
    with pytest.raises(InvalidInput, match="signed: only symmetric integers"):
        sparity.prune_weight(weight, inputs, solver="sparsegpt", bits=4, signed=True)


def test_signed_scales_in_the_joint_loop():
    weight, inputs = layer(6, 64)
    options = {"solver": "sparsegpt", "bits": 4, "group": 32, "symmetric": True, "signed": True}
    found, keep = sparity.prune_weight(weight, inputs, **options)
    scales = Integers(4, signed=True).fit(torch.where(keep, weight, 0.0)[:, :32]).scales[:, None]
    assert bool((scales < 0).any())
    steps = found[:, :32] / scales
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert -8 <= float(steps.min()) <= float(steps.max()) < 7.5
    assert (found[~keep] == 0).all()
    assert not torch.signbit(found[found == 0]).any()
