"""The laws of a method of healing, for every one that the registry finds."""

import copy

import pytest
import torch
from healing_tasks import IDS, METHODS, sparse_of, task_of, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workspaces import Notes

from sparity import registry
from sparity.healing.heal.guard import divergence
from sparity.healing.heal.low_rank import added
from sparity.models.attached_runtime import input_sites

NAMES = registry.names("heal.method")
FAMILIES = ("gpt2", "phi3", "opt", "gpt_neox", "mixtral")  # transposed, fused, an MLP without a module, experts
OF_TEXT = ("finetune", "dynamic_batches")  # they learn the text, not the dense model
TYPES = (torch.float32, torch.bfloat16)


def build(name):
    return registry.build("heal.method", {name: METHODS[name]})


def projections(model):
    return {projection.name: projection.weight for site in input_sites(model) for projection in site.projections}


def test_every_method_has_small_options():
    assert METHODS.keys() == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pattern=st.sampled_from(("unstructured", "2:4", "1:4", "block:4x4")), dtype=st.sampled_from(TYPES))
def test_zeros_stay_zeros_in_every_pattern_and_type(name, pattern, dtype, tmp_path):
    dense = tiny(dtype=dtype, blocks=1)
    model, masks = sparse_of(dense, pattern)
    before = copy.deepcopy(model.state_dict())
    build(name).heal(task_of(dense, model, masks, tmp_path))
    for key, weight in projections(model).items():
        assert not bool(weight[~masks[key]].any()), key
        assert not bool(torch.signbit(weight[~masks[key]]).any()) or name != "least_squares", key
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    outside = [key for key in before if ".layers." not in key]
    assert all(torch.equal(before[key], after[key]) for key in outside)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    changed = any(not torch.equal(before[key], after[key]) for key in before)
    assert changed != build(name).adds


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_in_every_layout_of_weights(name, family, tmp_path):
    dense = tiny(family, blocks=1)
    model, masks = sparse_of(dense)
    healed = build(name).heal(task_of(dense, model, masks, tmp_path))
    for key, weight in projections(model).items():
        assert not bool(weight[~masks[key]].any()), key
    with added(input_sites(model), healed.runtime):
        assert bool(model(IDS).logits.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_a_healed_model_is_nearer_to_the_dense_one_on_the_text_that_it_learned_from(name, tmp_path):
    dense = tiny()
    model, masks = sparse_of(dense)
    before = divergence(dense, model, IDS)
    healed = build(name).heal(task_of(dense, model, masks, tmp_path))
    with added(input_sites(model), healed.runtime):
        after = divergence(dense, model, IDS)
    assert after < before if name not in OF_TEXT else after != before


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_is_bit_identical(name, tmp_path):
    dense = tiny(blocks=5)
    model, masks = sparse_of(dense)
    start = copy.deepcopy(model)
    whole = build(name).heal(task_of(dense, model, masks, tmp_path))
    blockwise = name in ("least_squares", "eora", "slim", "reconstruction")
    for dies in (4, 5) if blockwise else (2, 4):
        killed, resumed = copy.deepcopy(start), copy.deepcopy(start)
        notes = Notes(dies=dies, folder=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            build(name).heal(task_of(dense, killed, masks, tmp_path, notes))
        again = build(name).heal(task_of(dense, resumed, masks, tmp_path, Notes(notes.saved, folder=tmp_path)))
        assert again.runtime.keys() == whole.runtime.keys()
        assert all(torch.equal(again.runtime[key], tensor) for key, tensor in whole.runtime.items())
        assert again.curves == whole.curves
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[key]), key
