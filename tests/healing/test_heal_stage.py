"""The stage `heal` in runs: the guard, the teacher, and every kind of sparse model that it is given."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from healing_tasks import IDS, METHODS, sparse_of, task_of, tiny
from workspaces import Notes

import sparity
from families import build, tiny_configs
from packed_folders import logits
from sparity import registry
from sparity.checkpoints.packed import runtime_of
from sparity.errors import CorruptFile, InvalidInput, NumericalError
from sparity.healing.heal.low_rank import added
from sparity.healing.heal.side_by_side import pairs
from sparity.healing.heal.stage import HealStage
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import plan
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe
from sparity.stages.order import check_order
from sparity.training.fine_tune.steps import Schedule, descend

PRUNE = {"prune": {"score": "magnitude", "pattern": "2:4"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose zeros matter, saved."""
    path = tmp_path_factory.mktemp("dense") / "model"
    tiny(dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "calibration.npy"
    np.save(path, np.random.default_rng(3).integers(0, 97, (16, 24)))
    return str(path)


def recipe_of(model, tokens, *stages, **sections):
    return Recipe.read(
        {
            "model": str(model),
            "calibration": {"tokens": tokens, "batch": 4},
            "stages": list(stages),
            "measure": {"perplexity": [], "speed": None},
            **sections,
        }
    )


def heal(name, **stage):
    return {"heal": {"method": {name: METHODS[name]}, **stage}}


def zeros(folder):
    decoder, found = Decoder.open(folder), {}
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            found |= {projection.name: projection.weight == 0 for projection in block.projections}
    return found


def decision(result):
    return json.loads((result.path / "sparity.json").read_text())["stages"][-1]["decision"]


# ---- the guard


def test_a_healing_that_helps_is_kept_and_told(folder, tokens, tmp_path):
    pruned = sparity.run(recipe_of(folder, tokens, PRUNE), output=tmp_path / "pruned", device="cpu")
    recipe = recipe_of(folder, tokens, PRUNE, heal("least_squares"), heal("distillation"))
    result = sparity.run(recipe, output=tmp_path / "out", device="cpu")
    found = decision(result)
    assert found["method"] == "distillation"
    assert found["kept"] == (found["kl_after"] < found["kl_before"])
    first = json.loads((result.path / "sparity.json").read_text())["stages"][1]["decision"]
    assert first["kept"]
    assert first["kl_after"] < first["kl_before"]
    before, after = zeros(pruned.path), zeros(result.path)
    assert all(torch.equal(after[name], mask) for name, mask in before.items())
    candidate = result.report.candidates[0]
    assert sum("KL to the dense model on 4 held-out sequences" in note for note in candidate.notes) == 2
    (curve,) = candidate.curves
    assert (curve.stage, curve.name, curve.steps) == ("heal", "loss", (1, 2, 3, 4))
    page = (result.path / "report.html").read_text()
    assert "Loss while heal trained" in page
    assert verify(result.path).problems == ()


def test_a_healing_that_harms_is_put_back_bit_for_bit_unless_the_guard_is_off(folder, tokens, tmp_path):
    wild = {"method": {"finetune": {"steps": 3, "rate": 0.3}}}
    pruned = sparity.run(recipe_of(folder, tokens, PRUNE), output=tmp_path / "pruned", device="cpu")
    guarded = sparity.run(recipe_of(folder, tokens, PRUNE, {"heal": wild}), output=tmp_path / "on", device="cpu")
    assert decision(guarded)["kept"] is False
    assert decision(guarded)["kl_after"] > decision(guarded)["kl_before"]
    assert any("put back, since it harms" in note for note in guarded.report.candidates[0].notes)
    assert torch.equal(logits(guarded.model()), logits(pruned.model()))
    harmed = sparity.run(
        recipe_of(folder, tokens, PRUNE, {"heal": {**wild, "guard": False}}), output=tmp_path / "off", device="cpu"
    )
    assert not torch.equal(logits(harmed.model()), logits(pruned.model()))
    assert decision(harmed) == {"method": "finetune", "kept": True}


def test_guard_off_is_what_yaml_makes_of_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: zoo:llama\nstages:\n  - heal: {guard: off}\n")
    assert Recipe.read(path).stages[0].guard is False


def test_a_dense_model_has_nothing_to_heal(folder, tokens):
    result = sparity.run(recipe_of(folder, tokens, heal("finetune")), device="cpu")
    assert torch.equal(logits(result.model()), logits(sparity.load(folder)))
    assert any("nothing to heal" in note for note in result.report.candidates[0].notes)


# ---- training that comes to no good


def test_a_loss_out_of_bounds_ends_a_training_at_its_last_checkpoint():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    losses, work, seen = iter([1.0, 1.5, 1.2, 1.9, 2.5, 9.0]), Notes(), []

    def loss(step):
        seen.append(float(weight.detach()))
        return (weight * 0).sum() + next(losses) + 0 * weight.sum()

    course = descend({"w": weight}, loss, work, Schedule(10, 0.1, every=2, stops=True))
    assert course.stopped == 5  # 2.5 is twice the first, and a nat more
    assert course.losses == pytest.approx({1: 1.0, 2: 1.5, 3: 1.2, 4: 1.9})
    assert work.saved[0] == 4
    fresh = torch.nn.Parameter(torch.tensor([1.0]))
    with pytest.raises(NumericalError, match="step 1: the loss is nan"):
        descend({"w": fresh}, lambda step: fresh.sum() * torch.nan, Notes(), Schedule(2, 0.1))
    assert (
        descend({"w": fresh}, lambda step: fresh.sum() * torch.nan, Notes(), Schedule(2, 0.1, stops=True)).stopped == 1
    )
    assert float(fresh.detach()) == 1.0


def test_a_divergence_leaves_the_last_good_step_and_says_so(tmp_path):
    dense = tiny()
    model, masks = sparse_of(dense)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = registry.build("heal.method", {"finetune": {"steps": 9, "rate": 50.0}}).heal(
        task_of(dense, model, masks, tmp_path)
    )
    assert "the loss grew out of bounds in step" in found.notes[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # none was kept before


# ---- the teacher


def test_a_model_that_was_made_sparse_before_learns_from_the_teacher_it_names(folder, tokens, tmp_path):
    pruned = sparity.run(recipe_of(folder, tokens, PRUNE), output=tmp_path / "pruned", device="cpu")
    alone = recipe_of(pruned.path, tokens, {"heal": {"method": "least_squares", "teacher": str(folder)}})
    result = sparity.run(alone, output=tmp_path / "out", device="cpu")
    assert decision(result)["kept"]
    assert all(torch.equal(zeros(result.path)[name], mask) for name, mask in zeros(pruned.path).items())
    together = sparity.run(recipe_of(folder, tokens, PRUNE, heal("least_squares")), device="cpu")
    assert torch.equal(logits(result.model()), logits(together.model()))
    assert prepare(alone).identity()["files"].keys() == {
        "stages.0.teacher.config.json", "stages.0.teacher.model.safetensors"
    }  # fmt: skip


def test_a_teacher_with_other_tokens_is_refused_before_any_work(folder, tokens, tmp_path):
    config = tiny_configs()["llama"]
    config.vocab_size = 98
    build(config).save_pretrained(tmp_path / "other")
    recipe = recipe_of(folder, tokens, {"heal": {"teacher": str(tmp_path / "other")}})
    with pytest.raises(InvalidInput, match="teacher knows 98 tokens and the model 97"):
        prepare(recipe)
    home = sparity.load("zoo:llama").name_or_path
    swapped = shutil.copytree(home, tmp_path / "swapped")
    content = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (swapped / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match="has another tokenizer than the model"):
        HealStage(teacher=str(swapped)).decide(Decoder.open("zoo:llama"), None)
    assert HealStage(teacher=home).decide(Decoder.open("zoo:llama"), None) == {"method": "least_squares"}


def test_blocks_that_are_not_known_are_not_compared(folder, tokens, tmp_path):
    cut = recipe_of(folder, tokens, {"structure": {"method": "shortgpt", "sparsity": 0.34}})
    shorter = sparity.run(cut, output=tmp_path / "cut", device="cpu")
    stage = {"method": "least_squares", "teacher": str(folder)}
    with pytest.raises(InvalidInput, match="is not known: cut and heal in one recipe"):
        sparity.run(recipe_of(shorter.path, tokens, {"heal": stage}), device="cpu")


def test_matrices_that_were_rewritten_are_not_compared(folder, tokens):
    for name, refused in (("least_squares", True), ("eora", True), ("reconstruction", True), ("distillation", False)):
        for before in ({"permute": {}}, {"rescale": {}}):
            stages = recipe_of(folder, tokens, before, PRUNE, heal(name)).stages
            if refused:
                with pytest.raises(InvalidInput, match="has rewritten them: take a method that compares predictions"):
                    check_order(stages)
            else:
                check_order(stages)


def test_experts_are_compared_only_where_there_are_as_many(tmp_path):
    dense = tiny("mixtral", blocks=1)
    model, masks = sparse_of(dense)
    fewer = copy.deepcopy(dense)
    experts = fewer.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, torch.nn.Parameter(getattr(experts, name)[:3], requires_grad=False))
    (pair,) = pairs(task_of(dense, model, masks, tmp_path))
    assert all(pair.twin(projection) is not None for projection in pair.block.projections)
    last = pair.block.projections[-1]
    pair.dense.model.model.layers[0].mlp.experts = experts
    assert pair.twin(last) is None
    assert pair.twin(pair.block.projections[0]) is not None


# ---- sparse models of every kind


@pytest.mark.parametrize("name", ["least_squares", "reconstruction", "distillation", "lora"])
@pytest.mark.parametrize(
    "structure",
    [
        {"method": {"minitron": {"dimension": "mlp_channels", "multiple_of": 4}}, "sparsity": 0.25},
        {"method": "shortgpt", "sparsity": 0.34},
    ],
    ids=["channels", "depth"],
)
def test_a_model_that_was_cut(name, structure, folder, tokens):
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
    assert IDS.shape == (6, 24)
