"""The ready recipes of the cache: each parses, runs, and leaves in the cache what it states."""

from pathlib import Path

import pytest
import torch
from learned import learned_of

import sparity
from sparity import registry
from sparity.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = sorted((RECIPES / "methods" / "cache").glob("*.yaml"))
SMALL = ["measure.windows=2", "measure.speed=null"]
PROMPT, DECODED = 300, 4
KEPT = {  # recipe -> what each head of a block holds of a prompt of 300 tokens, and after 4 more that were decoded
    "h2o": (75, 76),
    "streaming_llm": (300, 304),
    "tova": (75, 76),
    "lazyllm_static": (175, 179),  # on average over blocks: the last two hold 75
    "lazyllm": (175,),  # the same; how much is computed later depends on what is heeded
    "snapkv": (75, 79),
    "pyramidkv": (75, 79),  # on average over blocks
    "adakv": (75, 79),  # on average over heads
    "criticalkv": (75, 79),
    "defensivekv": (75, 79),
    "quest": (300, 304),
    "pqcache": (300, 304),
    "kivi": (300, 304),
    "minicache": (300, 304),
    "razorattention": (65 + 3 / 18 * 235, 69 + 3 / 18 * 235),  # three of 18 heads keep everything
    "keydiff": (75, 76),
    "knorm": (75, 76),
    "lagkv": (75, 79),
    "expected_attention": (75, 79),
    "kvzip": (75, 79),  # on average over heads and blocks
    "kvzap": (75, 76),  # on average over heads
    "duoattention": (182, 184),  # nine of 18 heads keep everything, the others 64 tokens
    "triattention": (75, 79),
    "random": (75, 76),
    "keep_all": (300, 304),
    "drop_all": (20, 20),
}


def test_every_policy_has_a_recipe_and_every_recipe_a_row():
    assert {path.stem for path in METHODS} == set(KEPT) == set(registry.names("cache.policy"))


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_comment_says_what_it_is(path):
    recipe = Recipe.read(path)
    assert recipe.model == "zoo:llama"
    assert [stage.name for stage in recipe.stages] == ["cache"]
    assert recipe.stages[0].how == path.stem
    assert path.read_text().startswith("# In the key-value cache ")
    assert f"sparity run {path.relative_to(RECIPES.parent)} -o OUT" in path.read_text()


@pytest.fixture(scope="module")
def model():
    return sparity.load("zoo:llama")


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_policy_holds_what_its_recipe_states(path, model):
    stage = Recipe.read(path).stages[0]
    more = learned_of(model, path.stem)
    options = {"sinks": stage.sinks, "recent": stage.recent, "every": stage.every, "decode": stage.decode, **more}
    with sparity.cache(model, stage.policy, stage.keep, **options):
        found = held_by(model)[: len(KEPT[path.stem])]
    assert found == pytest.approx(KEPT[path.stem], abs=1 if path.stem == "pyramidkv" else 1e-4)


def test_a_recipe_runs_to_the_end_and_its_model_holds_what_it_states(tmp_path):
    result = sparity.run(Recipe.read(RECIPES / "methods/cache/adakv.yaml", SMALL), output=tmp_path / "out")
    candidate = result.report.candidates[0]
    assert candidate.runtime == ("cache",)
    assert candidate.quality[0].kl == 0  # a text that is scored in one call sees the whole of it
    assert held_by(result.model()) == KEPT["adakv"]


@torch.no_grad()
def held_by(model):
    """Tokens of each head after a prompt, and after what was decoded."""
    ids, held = torch.arange(1, PROMPT + DECODED + 1)[None], []
    past = model(ids[:, :PROMPT]).past_key_values
    held.append(mean_held(past))
    for place in range(PROMPT, PROMPT + DECODED):
        model(ids[:, place : place + 1], past_key_values=past)
    assert past.get_seq_length() == PROMPT + DECODED
    return (held[0], mean_held(past))


def mean_held(past):
    return sum(float(layer.store.lengths.float().mean()) for layer in past.layers) / len(past.layers)
