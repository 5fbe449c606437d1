"""A search end to end on a real model: its answer is a recipe whose run is the model that was measured."""

import json

import pytest
import torch
import yaml

import sparity
from sparity.errors import InvalidInput
from sparity.formats.encodings.int8 import Int8
from sparity.models import Decoder
from sparity.recipe import Recipe
from sparity.stages.allocation import globs_of
from sparity.static.quantize.quantize_weight import quantize_weight

MENU = {
    "weights": {"dense": [], "half": [{"prune": {"score": "magnitude", "sparsity": 0.5}}]},
    "values": {
        "same": {"encoding": "same"},
        "int8": {"encoding": "int8", "stages": [{"quantize": {"bits": 8, "grid": {"integers": {"even": True}}}}]},
        "int4": {"encoding": {"int4": {"group": 32}}, "stages": [{"quantize": {"bits": 4, "group": 32}}]},
    },
}
TEXT = {"perplexity": ["python-docs:held-out"], "window": 64, "windows": 2}
CALIBRATION = {"text": "python-docs:calibration", "documents": "joined", "samples": 2, "length": 64, "batch": 2}
SMALL = {"choices": MENU, "measure": TEXT, "calibration": CALIBRATION, "samples": 1, "how": "separable"}


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("sparity-*.safetensors")}


def test_the_answer_is_a_recipe_that_gives_the_model_that_was_measured(tmp_path):
    result = sparity.tune("zoo:llama", maximise="bytes", max_kl=0.2, output=tmp_path / "out", runs=1, **SMALL)
    report, recipe = result.report, yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model", "recipe.yaml", "tune.html", "tune.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out/tune.json").read_text()) == report.to_dict()
    assert "<script" not in (tmp_path / "out/tune.html").read_text()
    assert result.met == (report.quality.kl <= 0.2)
    assert report.gain > 1.3  # int8 alone saves about half of what lies in blocks
    assert len(report.units) == 4 * 6
    assert [point.chosen for point in report.points].count(True) == 1
    assert report.points[0].gain == pytest.approx(1)
    again = sparity.run(recipe, output=tmp_path / "again")
    assert shards(again.path) == shards(tmp_path / "out/model")
    assert again.report.candidates[0].quality[0].kl == report.quality.kl
    chosen = {unit.choice for unit in report.units}
    spec = {str(m.packed().encoding.name) for m in Decoder.open(again.path).source.matrices.values()}
    assert ("int4" in spec) == any("int4" in each for each in chosen)


def test_a_limit_that_nothing_keeps_shows_the_closest():
    result = sparity.tune("zoo:llama", maximise="bytes", max_kl=0.0, **SMALL)
    assert not result.met
    assert (result.report.quality, result.report.gain) == (None, None)
    assert result.report.verdict.startswith("no combination keeps KL 0: the closest comes to perplexity ")
    assert Recipe.read(dict(result.report.recipe)).stages


def test_bad_questions():
    for options, words in (
        ({"maximise": "speed"}, "maximise 'speed'"),
        ({"how": "all"}, "how 'all'"),
        ({"runs": 0}, "runs 0: at least 1"),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.tune("zoo:llama", "+5%", **options)


def test_globs_say_which_names_are_chosen():
    names = [f"layers.{i}.{role}" for i in range(3) for role in ("q", "k")]
    assert globs_of(["layers.0.q", "layers.1.q", "layers.2.q", "layers.1.k"], names) == ["layers.*.q", "layers.1.k"]
    assert globs_of([], names) == []


def test_weights_on_a_grid_of_int8_are_stored_by_its_scales():
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = quantize_weight(weight, bits=8, grid={"integers": {"even": True}})
    rounded = found.weight.bfloat16()
    encoding, values, sides = Int8().on_grid(rounded, {"scales": found.scales})
    assert torch.equal(encoding.decode(values, sides, torch.bfloat16), rounded)
    assert Int8().on_grid(weight, {"scales": found.scales}) is None
    assert Int8().on_grid(rounded, {"scales": found.scales, "zeros": found.scales}) is None
    assert Int8().on_grid(rounded, {"scales": found.scales / 2}) is None  # codes beyond 127


def test_stages_of_single_projections_and_how_single_matrices_are_stored(tmp_path):
    recipe = {
        "model": "zoo:llama",
        "dtype": "bfloat16",
        "calibration": CALIBRATION,
        "stages": [
            {
                "quantize": {
                    "bits": 4, "group": 32, "dense": ["*.down_proj", "*.o_proj", "*.k_proj"],
                    "overrides": {"*.q_proj": {"bits": 8, "group": None, "grid": {"integers": {"even": True}}}},
                }
            },
            {"activations": {"sparsity": 0.125, "overrides": {"*": 0.0, "*.down_proj": 0.5}, "sites": "all"}},
        ],
        "measure": {"speed": None},
        "output": {
            "format": "packed",
            "matrices": {
                "*.up_proj": {"values": "int4"}, "*.q_proj": {"values": "int8"}, "*.down_proj": {"format": "columns"},
            },
        },
    }  # fmt: skip
    recipe["stages"][1]["activations"]["sparsity"] = mean = 0.5 * down_share()
    path = sparity.run(recipe, output=tmp_path / "out").path
    assert 0 < mean < 0.5
    stored = {
        name.split(".")[-1]: (packed.format, packed.encoding.name)
        for name, packed in ((m.name, m.packed()) for m in Decoder.open(path).source.matrices.values())
    }
    assert stored["up_proj"][1] == "int4"
    assert stored["q_proj"][1] == "int8"
    assert stored["down_proj"] == ("columns", "same")
    assert "o_proj" not in stored
    with pytest.raises(InvalidInput, match=r'output\.matrices: "x" matches no matrix'):
        sparity.run({**recipe, "output": {"format": "packed", "matrices": {"x": {}}}}, output=tmp_path / "other")


def down_share():
    decoder = Decoder.open("zoo:llama")
    every = [projection for site in decoder.sites(0) for projection in site.projections]
    return sum(p.weight.numel() for p in every if p.role == "down") / sum(p.weight.numel() for p in every)
