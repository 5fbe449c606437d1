"""The ready recipes that train: each parses, runs a few steps, and leaves a model that skips what it states."""

from pathlib import Path

import pytest

import sparity
from sparity import registry
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = [
    *(RECIPES / "methods" / "topk_training").glob("*.yaml"),
    *(RECIPES / "methods" / "relufication").glob("*.yaml"),
]
SMALL = ["calibration.samples=4", "calibration.length=64", "measure.windows=1", "measure.speed=null"]


def test_there_are_two():
    assert {path.stem for path in FILES} == {"q_sparse", "prosparse"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_training_runs_to_the_end(path, tmp_path):
    assert f"sparity run {path.relative_to(RECIPES.parent)} -o OUT" in path.read_text()
    recipe = Recipe.read(path, [*SMALL, f"stages.0.{path.parent.name}.steps=2"])
    result = sparity.run(recipe, output=tmp_path / "out")
    candidate = result.report.candidates[0]
    skipped = [change for change in candidate.changes if change.stage == "activations"]
    assert {change.target for change in skipped} == {recipe.stages[1].sparsity}
    assert candidate.quality[0].kl > 0
    assert result.model().config.hidden_act == ("relu" if path.stem == "prosparse" else "silu")


SPARSE = sorted((RECIPES / "methods" / "sparse_training").glob("*.yaml"))


def test_every_method_of_sparse_training_has_a_recipe():
    assert [path.stem for path in SPARSE] == registry.names("sparse_training.method")


@pytest.mark.parametrize("path", SPARSE, ids=lambda path: path.stem)
def test_a_sparse_training_leaves_half_of_the_weights(path, tmp_path):
    assert f"sparity run {path.relative_to(RECIPES.parent)} -o OUT" in path.read_text()
    recipe = Recipe.read(path, [*SMALL, "stages.0.sparse_training.steps=2"])
    assert recipe.stages[0].how == path.stem
    result = sparity.run(recipe, output=tmp_path / "out")
    assert verify(result.path).problems == ()  # 2:4 in every group
    assert all(change.zeros == 0.5 for change in result.report.candidates[0].changes)
