"""The ready recipes of activations: each parses, runs, and skips the share of the inputs that it states."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

import sparity
from sparity.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = sorted((RECIPES / "methods" / "activations").glob("*.yaml"))
SMALL = ["calibration.samples=4", "measure.windows=2", "measure.speed=null"]
SHARES = {"teal": 0.4}  # recipe -> the share of every projection's input channels


def test_every_recipe_has_a_row():
    assert {path.stem for path in METHODS} == set(SHARES)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_comment_says_what_it_is(path):
    recipe = Recipe.read(path)
    assert recipe.model == "zoo:llama"
    assert [stage.name for stage in recipe.stages] == ["activations"]
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20
    assert f"sparity run {path.relative_to(RECIPES.parent)} -o OUT" in path.read_text()


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_runs_to_the_end_and_skips_what_it_states(path, tmp_path):
    result = sparity.run(Recipe.read(path, SMALL), output=tmp_path / "out")
    candidate = result.report.candidates[0]
    assert len(candidate.changes) == 42
    for change in candidate.changes:
        assert change.target == SHARES[path.stem]
        assert change.target <= change.skipped < change.target + 0.02, change.name  # bins are under 1 % wide
    assert len(load_file(result.path / "sparity-dynamic" / "00-activations.safetensors")) == 42
    assert candidate.quality[0].tokens == 2 * 511
    assert candidate.quality[0].change > 0
