"""The stage `heal` on every kind of sparse model, and the low rank in a checkpoint."""

import json

import pytest
import torch
from healing_tasks import PRUNE, decision, heal, recipe_of, tiny, zeros

import sparity
from packed_folders import logits
from sparity.checkpoints.packed import runtime_of
from sparity.errors import CorruptFile, InvalidInput
from sparity.healing.heal.low_rank import added
from sparity.models.attached_runtime import input_sites
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import plan
from sparity.pipeline.run.verify import verify

# ---- sparse models of every kind


CHANNELS = {"method": {"minitron": {"dimension": "mlp_channels", "multiple_of": 4}}, "sparsity": 0.25}
DEPTH = {"method": "shortgpt", "sparsity": 0.34}


@pytest.mark.parametrize(
    ("structure", "name"),
    [(CHANNELS, "least_squares"), (CHANNELS, "lora"), (DEPTH, "reconstruction"), (DEPTH, "least_squares")],
)
def test_a_model_that_was_cut(structure, name, folder, tokens):
    result = sparity.run(recipe_of(folder, tokens, {"structure": structure}, heal(name)), device="cpu")
    assert decision(result)["kl_before"] > 0
    assert bool(logits(result.model()).isfinite().all())


def test_with_another_hidden_size_what_gives_as_many_numbers_is_fitted(folder, tokens):
    cut = {"structure": {"method": {"minitron": {"dimension": "hidden_size", "multiple_of": 4}}, "sparsity": 0.25}}
    result = sparity.run(recipe_of(folder, tokens, cut, {"heal": {"guard": False}}), device="cpu")
    without = sparity.run(recipe_of(folder, tokens, cut), device="cpu")
    changed = {
        name.split(".")[-2]
        for name, tensor in result.model().state_dict().items()
        if not torch.equal(tensor, without.model().state_dict()[name])
    }
    assert changed == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


@pytest.mark.parametrize("name", ["reconstruction", "eora"])
def test_another_hidden_size_is_refused_by_what_compares_outputs(name, folder, tokens):
    cut = {"structure": {"method": {"minitron": {"dimension": "hidden_size", "multiple_of": 4}}, "sparsity": 0.25}}
    with pytest.raises(InvalidInput, match="distillation"):
        sparity.run(recipe_of(folder, tokens, cut, heal(name)), device="cpu")


def test_a_packed_model_is_healed_and_packed_again(folder, tokens, tmp_path):
    packed = sparity.run(
        recipe_of(folder, tokens, PRUNE, output={"format": "packed"}), output=tmp_path / "packed", device="cpu"
    )
    stage = {"heal": {"method": "least_squares", "teacher": str(folder)}}
    again = recipe_of(packed.path, tokens, stage, output={"format": "packed"})
    result = sparity.run(again, output=tmp_path / "out", device="cpu")
    assert decision(result)["kept"]
    assert all(torch.equal(zeros(result.path)[name], mask) for name, mask in zeros(packed.path).items())
    assert json.loads((result.path / "config.json").read_text())["quantization_config"]["weights"] == "packed"
    assert bool(logits(result.model()).isfinite().all())


def test_what_is_quantised_keeps_grid_and_scales_with_eora_and_is_refused_otherwise(folder, tokens, tmp_path):
    quantize = {"quantize": {"method": "nearest", "bits": 3, "group": 8}}
    plain = sparity.run(recipe_of(folder, tokens, PRUNE, quantize), output=tmp_path / "plain", device="cpu")
    with pytest.raises(InvalidInput, match="would lose the weights that it was fitted to"):
        prepare(recipe_of(folder, tokens, PRUNE, quantize, heal("least_squares")))
    with pytest.raises(InvalidInput, match="values of a grid, whose scales lie beside them"):
        prepare(recipe_of(plain.path, tokens, {"heal": {"teacher": str(folder)}}))
    with pytest.raises(InvalidInput, match="would lose"):
        prepare(recipe_of(folder, tokens, PRUNE, quantize, {"heal": {"method": {"eora": {"merge": True}}}}))
    whole = recipe_of(folder, tokens, PRUNE, quantize, heal("eora"))
    result = sparity.run(whole, output=tmp_path / "out", device="cpu")
    assert decision(result)["kept"]
    for name, tensor in sparity.load(plain.path).state_dict().items():
        assert torch.equal(tensor, sparity.load(result.path, runtime=False).state_dict()[name])
    scales = [next((path / "sparity-scales").iterdir()).read_bytes() for path in (plain.path, result.path)]
    assert scales[0] == scales[1]
    later = recipe_of(plain.path, tokens, {"heal": {"method": {"eora": {"rank": 4}}, "teacher": str(folder)}})
    apart = sparity.run(later, output=tmp_path / "apart", device="cpu")
    assert torch.equal(logits(apart.model()), logits(result.model()))
    assert (apart.path / "sparity-scales").is_dir()


# ---- the low rank in a checkpoint


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_a_low_rank_lies_beside_the_weights_and_runs_in_every_loader(layout, folder, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = recipe_of(folder, tokens, PRUNE, heal("eora"), output={"format": layout})
    result = sparity.run(recipe, output=tmp_path / "out", device="cpu")
    (entry,) = runtime_of(result.path)
    assert entry.name == "heal"
    assert result.report.candidates[0].runtime == ("heal",)
    assert verify(result.path).problems == ()
    with_part, without = logits(result.model()), logits(sparity.load(result.path, runtime=False))
    assert not torch.equal(with_part, without)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(result.path)), with_part)
    model = result.model()
    if layout == "plain":
        with sparity.attached(model) as fast:
            assert torch.allclose(logits(fast), with_part, atol=0.15)
        assert torch.equal(logits(model), with_part)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(sparity.load(tmp_path / "saved")), with_part)
    predicted = plan(prepare(recipe)).stages[-1].bytes - plan(prepare(recipe)).stages[0].bytes
    stored = next((result.path / "sparity-dynamic").iterdir()).stat().st_size
    assert predicted < stored < predicted + 12_000  # the names of 42 tensors


def test_data_that_does_not_fit_is_refused():
    model = tiny(blocks=1)
    sites, name = input_sites(model), "model.layers.0.mlp.up_proj"
    good = {f"{name}.first": torch.ones(2, 32), f"{name}.second": torch.ones(64, 2)}
    with added(sites, good):
        pass
    for data, words in (
        ({**good, f"{name}.first": torch.ones(2, 31)}, "does not fit \\[64, 32\\]"),
        ({f"{name}.first": torch.ones(2, 32)}, "does not fit"),
        ({**good, f"{name}.second": torch.full((64, 2), torch.nan)}, "not finite"),
        ({**good, f"{name}.third": torch.ones(1)}, "unknown data"),
        ({"model.layers.9.x.first": torch.ones(2, 32)}, "no linear layer"),
    ):
        with pytest.raises(CorruptFile, match=words), added(sites, data):
            pass
    assert not any(module._forward_hooks for module in model.modules())
