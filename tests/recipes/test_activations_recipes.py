"""The ready recipes of activations: each parses, runs, and skips the share of the inputs that it states."""

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

import sparity
from sparity.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = sorted((RECIPES / "methods" / "activations").glob("*.yaml"))
SMALL = ["calibration.samples=4", "measure.window=256", "measure.windows=2", "measure.speed=null"]
FEWER = {  # steps of what is searched or trained
    "teal": ["budget={block_greedy: {step: 0.2, samples: 1}}"],
    "heal_bias": ["heal={bias: {steps: 4}}"],
    "dejavu": ["method={dejavu: {steps: 5}}"],
    "dejavu_heads": ["method={dejavu: {lookahead: true, steps: 5}}"],
}
SHARES = {  # recipe -> the share that it asks for on average, and of how many projections
    "teal": (0.4, 42),
    "cats": (0.5, 12),
    "chess": (0.5, 12),
    "scap": (0.4, 18),
    "wina": (0.4, 42),
    "rms": (0.4, 42),
    "statistical_topk": (0.5, 6),
    "thresholds": (0.4, 42),
    "plan_quantile": (0.5, 6),
    "plan_importance": (0.5, 6),
    "plan_depth": (0.5, 6),
    "plan": (0.5, 6),
    "r_sparse": (0.4, 42),
    "larosa": (0.4, 42),
    "plan_predictor": (0.5, 6),
    "griffin": (0.5, 6),
    "coreinfer": (0.5, 6),
    "tda": (0.5, 6),
    "dejavu": (0.5, 12),
    "dejavu_heads": (0.5, 24),
    "q_sparse": (0.4, 42),
    "heal_bias": (0.5, 42),
    "heal_low_rank": (0.5, 42),
}


def test_every_recipe_has_a_row():
    assert {path.stem for path in METHODS} == set(SHARES)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_comment_says_what_it_is(path):
    recipe = Recipe.read(path)
    assert recipe.model == ("zoo:relu" if path.stem.startswith("dejavu") else "zoo:llama")
    assert [stage.name for stage in recipe.stages] == ["activations"]
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20
    assert f"sparity run {path.relative_to(RECIPES.parent)} -o OUT" in path.read_text()


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_runs_to_the_end_and_skips_what_it_states(path, tmp_path):
    fewer = [f"stages.0.activations.{option}" for option in FEWER.get(path.stem, ())]
    result = sparity.run(Recipe.read(path, [*SMALL, *fewer]), output=tmp_path / "out")
    candidate, (share, count) = result.report.candidates[0], SHARES[path.stem]
    assert len(candidate.changes) == count
    sizes = [math.prod(change.shape_after) for change in candidate.changes]
    targets = [change.target * size for change, size in zip(candidate.changes, sizes, strict=True)]
    assert sum(targets) / sum(sizes) == pytest.approx(share, abs=1e-6)
    for change in candidate.changes:
        assert change.skipped == pytest.approx(change.target, abs=0.02), change.name
    data = load_file(result.path / "sparity-dynamic" / "00-activations.safetensors")
    places = 2 if path.stem in ("cats", "chess", "dejavu", "dejavu_heads") else 1  # projections that one place saves
    assert len({name.rpartition(".")[0] for name in data}) == count / places
    assert candidate.quality[0].tokens == 2 * 255
    assert candidate.quality[0].kl > 0
