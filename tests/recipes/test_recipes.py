"""The ready recipes: each parses, and each of recipes/methods runs and leaves the zeros that its rule states."""

from pathlib import Path

import pytest

import sparity
from sparity import registry
from sparity.recipe import Recipe
from sparity.static.prune.pruning import Pruning

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = sorted((RECIPES / "methods" / "prune").glob("*.yaml"))
EVERY = [RECIPES / "main.yaml", *METHODS]
SMALL = ["calibration.samples=4", "measure.window=256", "measure.windows=2", "measure.speed=null"]
KEYS = ("score", "pattern", "solver", "sparsity", "compare_within")

# The zeros of a matrix [rows, columns] that gives up `share`, by each method's rule.
BLOCK_COLUMNS = 128


def by_row(rows, columns, share):
    return rows * int(columns * share)


def by_layer(rows, columns, share):  # everything up to and including the score at that rank
    return int(rows * columns * share) + 1


def by_column_block(rows, columns, share):
    starts = range(0, columns, BLOCK_COLUMNS)
    return sum(by_layer(rows, min(BLOCK_COLUMNS, columns - start), share) for start in starts)


def by_tile(rows, columns, share):  # in each row of 16 x 16 blocks
    return 16 * 16 * (rows // 16) * int(columns // 16 * share)


def two_of_four(rows, columns, share):
    return rows * columns // 2


# Recipe -> its rule, and the largest share by which equal scores may exceed it.
RULES = {
    "magnitude": (by_layer, 0.01),  # the weights are bfloat16: many are equal
    "random": (by_layer, 1e-4),
    "wanda": (by_row, 0),
    "obs": (by_layer, 1e-3),
    "ria": (by_layer, 1e-3),
    "gradient": (by_layer, 1e-3),
    "fisher": (by_layer, 1e-3),
    "taylor": (by_layer, 1e-3),
    "obd": (by_layer, 1e-3),
    "gblm": (by_row, 0),
    "wanda_plus_plus": (by_row, 0),
    "wanda_plus_plus_rounds": (by_row, 0),
    "jsq": (by_row, 0),
    "sparsegpt": (by_column_block, 1e-3),
    "wanda_2_of_4": (two_of_four, 0),
    "sparsegpt_2_of_4": (two_of_four, 0),
    "sparsegpt_4_bits": (by_column_block, 0.2),  # what rounds to zero is one too
    "wanda_sparsegpt": (by_row, 0),
    "admm": (by_layer, 1e-3),
    "admm_2_of_4": (two_of_four, 1e-3),
    "alps": (by_layer, 1e-3),
    "alps_2_of_4": (two_of_four, 1e-3),
    "llm_surgeon": (by_layer, 1e-3),
    "llm_surgeon_2_of_4": (two_of_four, 0),
    "sparse_swaps": (by_row, 0),
    "dsnot": (by_row, 0),
    "thanos": (by_column_block, 1e-3),
    "block": (by_tile, 0),
    "global_threshold": (by_layer, 1e-3),
    "linear_depth": (by_row, 0),
    "log_depth": (by_row, 0),
    "owl": (by_row, 0),
    "greedy": (by_row, 0),
    "knapsack": (by_row, 0),
    "block_greedy": (by_row, 0),
    "evopress": (by_row, 0),
    "alpha_pruning": (by_row, 0),
    "atp": (by_row, 0),
}
LESS = {  # so that there is less to measure, or to exchange
    "greedy": ["budget.greedy.per=block"],
    "knapsack": ["budget.knapsack.per=block"],
    "block_greedy": ["budget.block_greedy.step=0.2", "budget.block_greedy.samples=1"],
    "evopress": ["budget={evopress: {per: block, generations: 2, offspring: 4, survivors: 2, samples: 1}}"],
    "atp": ["budget.atp.tries=3", "budget.atp.samples=2"],
    "sparse_swaps": ["solver.sparse_swaps.swaps=3"],
    **{name: ["solver={admm: {iterations: 6, rounds: 4}}"] for name in ("admm", "admm_2_of_4")},
    **{name: ["solver={llm_surgeon: {refinements: 3}}"] for name in ("llm_surgeon", "llm_surgeon_2_of_4")},
    **{name: ["solver={alps: {iterations: 10, refinements: 3}}"] for name in ("alps", "alps_2_of_4")},
}


def pruning_of(recipe, place=0):
    return Pruning.of(**{key: getattr(recipe.stages[place], key) for key in KEYS})


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_comment_says_what_it_is(path):
    recipe = Recipe.read(path)
    assert recipe.model == "zoo:llama"
    assert pruning_of(recipe).words
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20
    assert f"sparity run {path.relative_to(RECIPES.parent)} -o OUT" in path.read_text()


def test_the_main_recipe_ends_in_a_packed_model_of_the_type_that_the_kernels_take():
    recipe = Recipe.read(RECIPES / "main.yaml")
    assert (recipe.dtype, recipe.output.format, recipe.output.values) == ("bfloat16", "packed", "same")
    assert recipe.measure.speed.rounds == 5


def test_every_score_solver_and_budget_has_a_recipe():
    recipes = [Recipe.read(path) for path in METHODS]
    used = {
        "prune.score": {pruning_of(recipe).score.name for recipe in recipes},
        "prune.solver": {pruning_of(recipe).solver.name for recipe in recipes},
        "budget": {registry.build("budget", recipe.stages[0].budget).name for recipe in recipes},
    }
    for kind, names in used.items():
        own = {name for name in registry.names(kind) if registry.get(kind, name).__module__.startswith("sparity.")}
        assert names == own, kind


def test_every_recipe_has_a_rule():
    assert {path.stem for path in METHODS} == set(RULES)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_runs_to_the_end_with_the_sparsity_of_its_rule(path, tmp_path):
    shots = range(len(Recipe.read(path).stages))
    less = [f"stages.{place}.prune.{option}" for place in shots for option in LESS.get(path.stem, ())]
    recipe = Recipe.read(path, SMALL + less)
    result = sparity.run(recipe, output=tmp_path / "out")
    candidate = result.report.candidates[0]
    rule, surplus = RULES[path.stem]
    assert len(candidate.changes) == 42 * len(shots)
    for layer in candidate.changes[-42:]:
        rows, columns = layer.shape_after
        zeros = round(layer.zeros * rows * columns)
        expected = rule(rows, columns, layer.target)
        assert expected <= zeros <= expected + int(surplus * rows * columns), layer.name
    pruning = pruning_of(recipe)
    target = sum(pruning_of(recipe, place).sparsity for place in shots) / len(shots)
    assert candidate.target == pytest.approx(target, abs=1e-4 if pruning.across_layers else 1e-9)
    assert [quality.text for quality in candidate.quality] == ["python-docs:held-out"]
    assert candidate.quality[0].tokens == 2 * 255
    assert candidate.quality[0].change > 0
    assert candidate.speed is None
