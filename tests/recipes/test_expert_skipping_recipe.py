"""The ready recipe of skipped experts runs, and predictions move a little."""

from pathlib import Path

import sparity
from sparity.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PATH = RECIPES / "methods" / "expert_skipping" / "naee.yaml"
SMALL = ["calibration.samples=4", "measure.window=256", "measure.windows=2", "measure.speed=null"]


def test_the_recipe_runs_to_the_end(tmp_path):
    recipe = Recipe.read(PATH, SMALL)
    assert [stage.name for stage in recipe.stages] == ["expert_skipping"]
    assert f"sparity run {PATH.relative_to(RECIPES.parent)} -o OUT" in PATH.read_text()
    candidate = sparity.run(recipe, output=tmp_path / "out").report.candidates[0]
    assert candidate.runtime == ("expert_skipping",)
    assert candidate.stages == ("50 % of the experts behind each token's first",)
    assert 0 < candidate.quality[0].kl < 0.1
