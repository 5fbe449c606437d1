"""The ready recipes of healing: each parses, runs, keeps 2:4, and is judged on text that was held out."""

import json
from pathlib import Path

import pytest

import sparity
from sparity import registry
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = sorted((RECIPES / "methods" / "heal").glob("*.yaml"))
SMALL = [
    "calibration.samples=8",
    "calibration.length=64",
    "measure.window=64",
    "measure.windows=1",
    "measure.speed=null",
]
STEPS = {"reconstruction": 2, "lora": 2, "distillation": 2, "finetune": 2, "dynamic_batches": 2}


def test_every_method_has_a_recipe():
    assert {path.stem for path in METHODS} == set(registry.names("heal.method"))


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_runs_and_keeps_its_pattern(path, tmp_path):
    assert path.read_text().startswith("# ")
    assert f"sparity run {path.relative_to(RECIPES.parent)} -o OUT" in path.read_text()
    place = len(Recipe.read(path).stages) - 1
    steps = [f"stages.{place}.heal.method.{path.stem}.steps={STEPS[path.stem]}"] if path.stem in STEPS else []
    recipe = Recipe.read(path, [*SMALL, *steps])
    assert recipe.stages[place].how == path.stem
    result = sparity.run(recipe, output=tmp_path / "out")
    assert verify(result.path).problems == ()  # 2:4 in every group
    found = json.loads((tmp_path / "out/sparity.json").read_text())["stages"][place]["decision"]
    assert found["kl_before"] > 0
    assert result.report.candidates[0].quality[0].kl > 0
