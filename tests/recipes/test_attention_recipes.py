"""The ready recipes of attention by blocks: each parses, and computes less of a prompt in every model that it makes."""

from pathlib import Path

import pytest
import torch

import sparity
from sparity import registry
from sparity.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = sorted((RECIPES / "methods" / "attention_blocks").glob("*.yaml"))
SMALL = ["measure.windows=2", "measure.speed=null"]


def test_every_layout_has_a_recipe():
    assert {path.stem for path in METHODS} == set(registry.names("attention.layout"))


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_comment_says_what_it_is(path):
    recipe = Recipe.read(path)
    assert recipe.model == "zoo:llama"
    assert [stage.name for stage in recipe.stages] == ["attention_blocks"]
    assert recipe.stages[0].how == path.stem
    assert path.read_text().startswith("# Of a prompt's attention the blocks ")
    assert f"sparity run {path.relative_to(RECIPES.parent)} -o OUT" in path.read_text()


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_layout_leaves_blocks_out(path):
    stage = Recipe.read(path).stages[0]
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 1, 2, 16, 32, generator=generator).repeat_interleave(32, 3)
    states = centres + 0.1 * torch.randn(centres.shape, generator=generator)
    mask = stage.choice(3 * states[0], states[1], 1.0, 0)
    assert 16 * 2 <= int(mask.sum()) < 2 * 16 * 17 // 2


def test_a_calibrated_recipe_runs_to_the_end(tmp_path):
    result = sparity.run(
        Recipe.read(RECIPES / "methods/attention_blocks/spargeattn.yaml", SMALL), output=tmp_path / "out"
    )
    candidate = result.report.candidates[0]
    assert candidate.runtime == ("attention_blocks",)
    assert 0 < candidate.quality[0].kl < 0.1
