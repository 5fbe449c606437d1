"""The stage `heal` in runs: the guard, trainings that come to no good, and the teacher."""

import copy
import json
import shutil

import pytest
import torch
from healing_tasks import PRUNE, decision, heal, recipe_of, sparse_of, task_of, tiny, zeros
from workspaces import Notes

import sparity
from families import build, tiny_configs
from packed_folders import logits
from sparity import registry
from sparity.errors import InvalidInput, NumericalError
from sparity.healing.heal.side_by_side import pairs
from sparity.healing.heal.stage import HealStage
from sparity.models import Decoder
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe
from sparity.stages.order import check_order
from sparity.training.fine_tune.steps import Schedule, descend

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
    cut = Decoder.open("zoo:llama").outlined({"intermediate_size": 256})  # what the stage finds behind structure
    with pytest.raises(InvalidInput, match="has another tokenizer than the model"):
        HealStage(teacher=str(swapped)).decide(cut, None)
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
                with pytest.raises(
                    InvalidInput, match="has rewritten or added to them: take a method that compares predictions"
                ):
                    check_order(stages)
            else:
                check_order(stages)
    with pytest.raises(InvalidInput, match=r"stages\.2 \(heal: eora\) holds every matrix against the dense model's"):
        check_order(recipe_of(folder, tokens, PRUNE, heal("eora"), heal("eora")).stages)


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
