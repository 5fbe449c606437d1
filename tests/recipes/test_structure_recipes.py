"""The ready recipes of structure: each parses, runs, and leaves a stock checkpoint of the sizes that it states."""

import json
from pathlib import Path

import pytest
import torch

import sparity
from sparity import registry
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = sorted((RECIPES / "methods" / "structure").glob("*.yaml"))
SMALL = ["measure.window=64", "measure.windows=1", "measure.speed=null"]
LESS = {name: [f"stages.0.structure.method.{name}.steps=2"] for name in ("sheared", "compresso")}
FOUR_BLOCKS = {"num_hidden_layers": 4}
SIX_EXPERTS = {"num_local_experts": 6}
SIZES = {  # recipe -> what the configuration then says
    "magnitude": {"intermediate_size": 384},
    "minitron": {"intermediate_size": 384},
    "bonsai": {"intermediate_size": 384},
    "flap": {"intermediate_size": 338, "num_key_value_heads": 2, "num_attention_heads": 4, "mlp_bias": True},
    "llm_surgeon": {"intermediate_size": 338, "num_key_value_heads": 2, "num_attention_heads": 4},
    "lora_prune": {"intermediate_size": 338, "num_key_value_heads": 2, "num_attention_heads": 4},
    "llm_pruner": {"intermediate_size": 307, "num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 32},
    "sheared": {"intermediate_size": 384, "num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 32},
    "compresso": {"intermediate_size": 338, "num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 32},
    "two_ssp": {"intermediate_size": 368},
    "slicegpt": {"hidden_size": 144, "head_dim": 32, "tie_word_embeddings": False},
    "shortgpt": FOUR_BLOCKS,
    "angular": FOUR_BLOCKS,
    "sleb": FOUR_BLOCKS,
    "laco": FOUR_BLOCKS,
    "linear_map": FOUR_BLOCKS,
    "frequency": SIX_EXPERTS,
    "reap": SIX_EXPERTS,
    "naee": SIX_EXPERTS,
    "ream": SIX_EXPERTS,
}


def test_every_method_has_a_recipe_and_every_recipe_a_row():
    own = registry.names("structure.method")
    assert {path.stem for path in METHODS} == set(SIZES) == set(own)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_runs_to_a_stock_checkpoint_of_the_sizes_that_it_states(path, tmp_path):
    from transformers import AutoModelForCausalLM

    text = ["calibration.samples=2", "calibration.length=64"] if path.stem != "magnitude" else []
    recipe = Recipe.read(path, [*SMALL, *text, *LESS.get(path.stem, [])])
    assert path.read_text().startswith("# ")
    assert f"sparity run {path.relative_to(RECIPES.parent)} -o OUT" in path.read_text()
    assert registry.build("structure.method", recipe.stages[0].method).name == path.stem
    result = sparity.run(recipe, output=tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: config[name] for name in SIZES[path.stem]} == SIZES[path.stem]
    assert verify(result.path).problems == ()
    quality = result.report.candidates[0].quality[0]
    assert quality.perplexity > 0
    assert quality.kl > 0
    stock, ours = AutoModelForCausalLM.from_pretrained(result.path), result.model()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, ours(ids).logits)
    kept = json.loads((tmp_path / "out/kept_indices.json").read_text())["kept"]
    if "num_hidden_layers" in SIZES[path.stem]:
        assert len(kept["model"]["depth"]) == 4
    elif "num_local_experts" in SIZES[path.stem]:
        assert [len(block["experts"]) for block in kept.values()] == [6] * 6
