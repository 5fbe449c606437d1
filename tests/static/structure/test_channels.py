"""MLP channels by input norm: the smallest go, the result is an ordinary smaller model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparity
from families import tiny_configs
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import plan
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe
from sparity.static.structure.units import largest, left_of

TOKENS = torch.arange(40)[None] % 97


def recipe(token_files, *stages, **sections):
    return Recipe.read(
        {
            "calibration": {"tokens": token_files["calibration"], "batch": 3},
            "stages": list(stages),
            "measure": {"speed": None},
            **sections,
        }
    )


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_the_largest_stay_and_of_equal_ones_the_later():
    assert largest(torch.tensor([3.0, 1.0, 2.0, 5.0]), 2).tolist() == [0, 3]
    assert largest(torch.tensor([1.0, 1.0, 0.0, 1.0]), 2).tolist() == [1, 3]
    assert largest(torch.tensor([1.0, 2.0]), 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "size", "kept"),
    [
        ({"sparsity": 0.25}, 64, 48),
        ({"sparsity": 0.3}, 64, 45),  # int(19.2) go
        ({"sparsity": 0.3, "multiple_of": 8}, 64, 48),
        ({"sparsity": 0.99}, 64, 1),
        ({"sparsity": 0.99, "multiple_of": 100}, 64, 64),
        ({"sparsity": 0.0}, 64, 64),
    ],
)
def test_how_many_stay(options, size, kept):
    assert left_of(size, **options) == kept


@pytest.mark.parametrize("family", tuple(tiny_configs()))
def test_it_opens_in_stock_transformers_with_the_logits_of_a_model_whose_channels_are_zero(
    family, family_models, token_files, tmp_path
):
    model = family_models[family]
    result = sparity.run(
        recipe(token_files, {"channels": {"sparsity": 0.25}}), model=model, output=tmp_path / "out", device="cpu"
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    kept = json.loads((tmp_path / "out" / "kept_indices.json").read_text())["kept"]
    decoder, zeroed = Decoder.open(model), {}
    assert list(kept) == [decoder.block_name(index) for index in range(3)]
    oracle = type(model)(model.config).eval()
    oracle.load_state_dict(model.state_dict())
    for index in range(3):
        name = decoder.block_name(index)
        sites = decoder.family.sites(oracle.get_submodule(name), name, oracle.config)
        weights = {projection.name: projection for site in sites for projection in site.projections}
        for dimension in decoder.dimensions(index):
            units = kept[name].get(dimension.name)
            if units is None:
                continue
            zeroed[dimension.name] = len(units)
            assert len(units) == dimension.size - int(dimension.size * 0.25)
            gone = sorted(set(range(dimension.size)) - set(units))
            for cut in dimension.cuts:
                if cut.axis == "columns":
                    weights[cut.projection].weight[:, gone] = 0
    assert zeroed
    torch.testing.assert_close(logits(stock), logits(oracle), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(stock), logits(result.model()))
    assert verify(tmp_path / "out").problems == ()
    candidate = result.report.candidates[0]
    assert candidate.parameters == stock.num_parameters() < result.report.parameters
    assert all(change.shape_after < change.shape_before for change in candidate.changes)
    assert json.loads((tmp_path / "out" / "sparity.json").read_text())["stages"][0]["name"] == "channels"


def test_the_channels_that_go_are_those_with_the_smallest_norms(family_models, token_files, tmp_path):
    import numpy as np

    model = family_models["llama"]
    sparity.run(recipe(token_files, {"channels": {}}), model=model, output=tmp_path / "out", device="cpu")
    kept = json.loads((tmp_path / "out" / "kept_indices.json").read_text())["kept"]["model.layers.0"]["mlp_channels"]
    seen = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(torch.from_numpy(np.load(token_files["calibration"])))
    hook.remove()
    norms = seen[0].reshape(-1, 64).square().sum(0)
    assert kept == sorted(norms.argsort()[16:].tolist())


def test_twice_is_composed_in_units_of_the_dense_model(family_models, token_files, tmp_path):
    half = {"channels": {"sparsity": 0.5}}
    result = sparity.run(
        recipe(token_files, half, half), model=family_models["llama"], output=tmp_path / "out", device="cpu"
    )
    kept = json.loads((tmp_path / "out" / "kept_indices.json").read_text())["kept"]
    once = sparity.run(recipe(token_files, half), model=family_models["llama"], output=tmp_path / "once", device="cpu")
    before = json.loads((once.path / "kept_indices.json").read_text())["kept"]
    for block, dimensions in kept.items():
        assert len(dimensions["mlp_channels"]) == 16
        assert len(before[block]["mlp_channels"]) == 32
    assert set(kept["model.layers.0"]["mlp_channels"]) < set(before["model.layers.0"]["mlp_channels"])
    assert result.model().config.intermediate_size == 16
    dense = family_models["llama"].model.layers[0].mlp.up_proj.weight
    left = result.model().model.layers[0].mlp.up_proj.weight
    assert torch.equal(left, dense[kept["model.layers.0"]["mlp_channels"]])


def test_before_pruning_to_a_pattern_packed_and_the_other_way_refused(family_models, token_files, tmp_path):
    llama = family_models["llama"]
    cut = {"channels": {"sparsity": 0.25, "multiple_of": 16}}
    pruned = {"prune": {"solver": "sparsegpt", "pattern": "2:4"}}
    sections = {"dtype": "bfloat16", "output": {"format": "packed"}}
    chosen = recipe(token_files, cut, pruned, **sections)
    result = sparity.run(chosen, model=llama, output=tmp_path / "out", device="cpu")
    assert verify(result.path).problems == ()
    model = result.model()
    assert model.config.intermediate_size == 48
    assert "PackedLinear(in_features=48, out_features=32" in str(model.model.layers[0].mlp.down_proj)
    with pytest.raises(InvalidInput, match=r"stages\.1 \(channels\) comes after stages\.0 \(prune\), which would lose"):
        sparity.run(recipe(token_files, pruned, cut), model=llama, output=tmp_path / "no", device="cpu")
    free = {"prune": {"score": "wanda", "sparsity": 0.5}}
    both = sparity.run(recipe(token_files, free, cut), model=llama, output=tmp_path / "both", device="cpu")
    assert all(change.zeros > 0.4 for change in both.report.candidates[0].totals.outcomes)


def test_the_plan_says_what_will_be_left(family_models, token_files):
    found = plan(prepare(recipe(token_files, {"channels": {}}), family_models["llama"], "cpu"))
    (stage,) = found.stages
    shapes = {change.role: (change.shape_before, change.shape_after) for change in stage.changes}
    assert shapes == {"gate": ((64, 32), (48, 32)), "up": ((64, 32), (48, 32)), "down": ((32, 64), (32, 48))}
    assert stage.parameters == family_models["llama"].num_parameters() - 3 * 3 * 16 * 32
    assert stage.statistics == ("column_norm",)


def test_what_cannot_be_cut_is_refused():
    for options, words in (
        ({"sparsity": 1}, "less than 1"),
        ({"sparsity": -1}, "greater"),
        ({"multiple_of": 0}, "greater"),
    ):
        with pytest.raises(InvalidInput, match=words):
            Recipe.read({"stages": [{"channels": options}]})
