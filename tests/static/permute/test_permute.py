"""The stage: the logits of the dense model, for every family; and 2:4 keeps more of the score."""

import json
from pathlib import Path

import pytest
import torch
from rewritten_models import logits, matrices, recipe

import sparity
from families import tiny_configs
from sparity.errors import InvalidInput
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe
from sparity.static.permute.search import kept_score

EVERYWHERE = ["mlp_channels", "values", "residual"]


@pytest.mark.parametrize("family", tuple(tiny_configs()))
def test_the_logits_stay(family, family_models, token_files, tmp_path):
    family_models[family].save_pretrained(tmp_path / "dense")
    stage = {"permute": {"score": "magnitude", "where": EVERYWHERE}}
    result = sparity.run(recipe(token_files, tmp_path / "dense", stage), output=tmp_path / "out", device="cpu")
    dense, found = (sparity.load(folder) for folder in (tmp_path / "dense", result.path))
    torch.testing.assert_close(logits(found), logits(dense), rtol=2e-4, atol=2e-5)
    assert verify(result.path).problems == ()
    before, after = matrices(tmp_path / "dense"), matrices(result.path)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    for key, matrix in before.items():
        assert torch.equal(matrix.flatten().sort().values, after[key].flatten().sort().values)


def test_readers_keep_more_of_their_score(tiny_llama_folder, token_files, tmp_path):
    stage = {"permute": {"score": "magnitude"}}
    result = sparity.run(recipe(token_files, tiny_llama_folder, stage), output=tmp_path / "out", device="cpu")
    before, after = matrices(tiny_llama_folder), matrices(result.path)
    for (index, role, expert), matrix in before.items():
        if role in ("o", "down"):
            kept = [kept_score(each.abs(), 2, 4) for each in (matrix, after[index, role, expert])]
            assert kept[1] > kept[0]
    assert result.report.candidates[0].quality == () or result.report.candidates[0].quality[0].kl < 1e-6


def test_pruning_after_it_loses_less_of_the_output(tiny_llama_folder, token_files, tmp_path):
    prune = {"prune": {"score": "wanda", "pattern": {"n_of_m": {"n": 2, "m": 4}}, "sparsity": 0.5}}
    found = {}
    for name, stages in (("without", [prune]), ("with", [{"permute": {}}, prune])):
        result = sparity.run(recipe(token_files, tiny_llama_folder, *stages), output=tmp_path / name, device="cpu")
        changes = [change for change in result.report.candidates[0].changes if change.stage == "prune"]
        assert {change.zeros for change in changes} == {0.5}
        dense = matrices(tiny_llama_folder)
        left = matrices(result.path)
        found[name] = sum(
            float(left[key].abs().sum() / dense[key].abs().sum()) for key in dense if key[1] in ("o", "down")
        )
    assert found["with"] > found["without"]


def test_the_record_says_which_channels_stand_where(tiny_llama_folder, token_files, tmp_path):
    result = sparity.run(
        recipe(token_files, tiny_llama_folder, {"permute": {"score": "magnitude", "where": ["mlp_channels"]}}),
        output=tmp_path / "out",
        device="cpu",
    )
    kept = json.loads((result.path / "kept_indices.json").read_text())["kept"]
    before, after = matrices(tiny_llama_folder), matrices(result.path)
    for index, (name, dimensions) in enumerate(kept.items()):
        assert str(index) in name
        order = torch.tensor(dimensions["mlp_channels"])
        assert torch.equal(after[index, "down", None], before[index, "down", None][:, order])
        assert torch.equal(after[index, "gate", None], before[index, "gate", None][order])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 3, "m": 2}, "n is m or less"),
        ({"score": "fisher"}, "needs gradients: choose wanda, ria or magnitude"),
        ({"where": ["heads"]}, "where"),
    ],
)
def test_what_it_refuses(tiny_llama_folder, token_files, options, words):
    with pytest.raises(InvalidInput, match=words):
        sparity.run(recipe(token_files, tiny_llama_folder, {"permute": options}), device="cpu")


def test_its_recipe_leaves_two_of_four():
    recipes = Path(__file__).parents[3] / "recipes/methods/permute"
    (path,) = recipes.glob("*.yaml")
    small = ["calibration.samples=2", "calibration.length=64", "measure.windows=1", "measure.speed=null"]
    changes = sparity.run(Recipe.read(path, small), device="cpu").report.candidates[0].changes
    assert {change.stage for change in changes} == {"permute", "prune"}
    assert {change.zeros for change in changes if change.stage == "prune"} == {0.5}
