"""The recipe of a smaller dense model: depth, MLPs and hidden size cut, distilled, then fewer bits."""

import json
from pathlib import Path

import torch

import sparity
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe

PATH = Path(__file__).parents[2] / "recipes" / "minitron.yaml"
SMALL = [
    "model=zoo:llama", "calibration.samples=8", "calibration.length=64", "measure.windows=1", "measure.window=64",
    "measure.speed=null", "stages.3.heal.method.distillation.steps=4",
]  # fmt: skip


def test_it_is_for_the_real_model_and_in_the_lectures_proportion():
    recipe = Recipe.read(PATH)
    assert recipe.model == "zoo:smollm2"
    assert [stage.name for stage in recipe.stages] == ["structure", "structure", "structure", "heal", "quantize"]
    left = [1 - stage.sparsity for stage in recipe.stages[:3]]
    assert [round(share, 2) for share in left] == [0.5, round(9216 / 14336, 2), 3072 / 4096]
    assert f"sparity run {PATH.relative_to(PATH.parents[1])} -o OUT" in PATH.read_text()


def test_it_runs_to_a_stock_checkpoint_of_a_smaller_llama(tmp_path):
    from transformers import AutoModelForCausalLM

    result = sparity.run(Recipe.read(PATH, SMALL), output=tmp_path / "out", device="cpu")
    config = json.loads((result.path / "config.json").read_text())
    sizes = ("num_hidden_layers", "intermediate_size", "hidden_size", "num_attention_heads", "head_dim")
    assert [config[name] for name in sizes] == [3, 352, 144, 6, 32]
    assert verify(result.path).problems == ()
    record = json.loads((result.path / "sparity.json").read_text())
    healed = record["stages"][3]["decision"]
    assert healed["kept"]
    assert healed["kl_after"] < healed["kl_before"]
    ids = torch.arange(40)[None]
    stock = AutoModelForCausalLM.from_pretrained(result.path)
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, result.model()(ids).logits)
    kept = json.loads((result.path / "kept_indices.json").read_text())["kept"]
    assert len(kept["model"]["depth"]) == 3
    assert len(kept["model"]["hidden_size"]) == 144
    assert result.report.candidates[0].totals.bits is not None
