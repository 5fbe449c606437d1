"""Contenders: what is held, and that every way to compute gives the same tokens."""

import copy

import pytest
import torch
from torch import nn

import sparity
from sparity.engine.attach import attach
from sparity.engine.decoding.model import disable_fast_path
from sparity.engine.modules.linear import DenseLinear, PackedLinear
from sparity.errors import InvalidInput
from sparity.measure.timing.contenders import Contender, contenders, held_bytes, hold_dense, stored_bytes
from sparity.pipeline.run.packing import convert


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The bundled model as 2:4, packed."""
    folder = tmp_path_factory.mktemp("contenders")
    recipe = {
        "model": "zoo:llama",
        "stages": [{"prune": {"score": "magnitude", "pattern": "2:4"}}],
        "measure": {"speed": None},
    }
    sparity.run(recipe, output=folder / "plain")
    convert(str(folder / "plain"), folder / "packed", "same", False)
    return folder / "packed"


@pytest.fixture(scope="module")
def opened(packed):
    every = contenders(str(packed), ["dense", "transformers", str(packed.parent / "plain")])
    return {contender.name: (contender, contender.open()) for contender in every}


def kinds(model):
    return {type(layer) for layer in model.model.layers.modules() if isinstance(layer, nn.Linear | PackedLinear)}


def test_the_model_itself_is_last_and_opponents_keep_their_order(packed):
    every = contenders(str(packed), ["zoo:llama", "dense"])
    assert [(contender.name, contender.how) for contender in every] == [
        ("zoo:llama", "engine"),
        ("dense", "dense"),
        (str(packed), "engine"),
    ]
    assert [contender.computed for contender in every] == [
        "engine, a plain checkpoint, packed when loaded",
        "engine, the same weights held dense",
        "engine, packed",
    ]
    with pytest.raises(InvalidInput, match="zoo:llama is named twice"):
        contenders("zoo:llama", ["dense", "zoo:llama"])


def test_each_is_held_as_it_says(packed, opened):
    assert kinds(opened["dense"][1]) == {DenseLinear}
    assert kinds(opened["transformers"][1]) == {nn.Linear}
    assert kinds(opened[str(packed)][1]) == kinds(opened[str(packed.parent / "plain")][1]) == {PackedLinear}
    held = {name: held_bytes(model) for name, (_, model) in opened.items()}
    assert held["dense"] == held["transformers"] > held[str(packed)] == held[str(packed.parent / "plain")]


def test_bytes_are_known_before_loading(packed, opened):
    for contender, model in opened.values():
        if contender.how != "engine" or contender.folder == packed:
            assert stored_bytes(contender) == pytest.approx(held_bytes(model), rel=0.01)


def test_all_compute_the_same(opened):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [model(ids, use_cache=False).logits[0, -1].float() for _, model in opened.values()]
    for other in logits[1:]:
        assert torch.allclose(other, logits[0], atol=0.02 * float(logits[0].abs().max()))


def test_a_packed_layer_becomes_a_plain_one_with_its_weight_and_bias(packed):
    model = contenders(str(packed), [])[0].open()
    layer = model.model.layers[0].mlp.up_proj
    layer.bias = nn.Parameter(torch.ones(layer.out_features, dtype=torch.bfloat16))
    weight = layer.weight
    hold_dense(model)
    found = model.model.layers[0].mlp.up_proj
    assert type(found) is nn.Linear
    assert torch.equal(found.weight, weight)
    assert found.bias is layer.bias


def test_a_weight_in_two_places_counts_once(family_models):
    model = copy.deepcopy(family_models["llama"]).bfloat16()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    attach(model, form="bitmask")
    once, layer = held_bytes(model), model.model.layers[0].mlp.up_proj
    model.model.layers[1].mlp.up_proj = nn.Identity()
    assert held_bytes(model) == once
    model.model.layers[0].mlp.up_proj = nn.Identity()
    assert held_bytes(model) == once - layer.packed.nbytes


def test_packed_experts_become_plain_ones_and_count_as_held(family_models):
    model = copy.deepcopy(family_models["mixtral"]).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter[..., ::2] = 0
    wanted = {name: weight.clone() for name, weight in model.state_dict().items()}
    dense = held_bytes(model)
    attach(model)
    assert dense / 2 < held_bytes(model) < dense
    hold_dense(model)
    assert held_bytes(model) == dense
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    disable_fast_path(model)
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_only_the_subject_has_its_stages_at_run_time(tiny_llama_folder, token_files, tmp_path):
    recipe = {
        "model": str(tiny_llama_folder),
        "calibration": {"tokens": token_files["calibration"]},
        "stages": [{"activations": {"sparsity": 0.9}}],
        "measure": {"speed": None},
    }
    folder = sparity.run(recipe, output=tmp_path / "out").path
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = {how: Contender("x", folder, how).open()(ids).logits for how in ("engine", "dense", "transformers")}
        plain = sparity.load(tiny_llama_folder, dtype="bfloat16")(ids).logits
    assert torch.equal(logits["transformers"], plain)
    torch.testing.assert_close(logits["dense"], plain, atol=0.05, rtol=0.05)
    assert (logits["engine"] - plain).abs().max() > 0.2
