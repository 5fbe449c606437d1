"""Stages that train the whole model: masks and penalties by hand, steps as published, and what they leave."""

import copy
import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from workspaces import Notes

import sparity
from families import build, tiny_configs
from packed_folders import logits
from sparity import registry
from sparity.dynamic.activations.methods.thresholds import Thresholds
from sparity.errors import InvalidInput, NumericalError
from sparity.models import Decoder
from sparity.models.activation_functions import activation_functions, function_attribute
from sparity.training.fine_tune.steps import Schedule, descend, next_token_loss, train_blocks
from sparity.training.relufication import Relufication, magnitudes, rising
from sparity.training.topk_training import TopkTraining, masked_inputs, top

IDS = torch.randint(2, 97, (6, 24), generator=torch.Generator().manual_seed(0))


def tiny(family="llama"):
    return build(tiny_configs()[family])


# ---- the masks of Q-Sparse


def test_top_channels_and_their_gradient_by_hand():
    x = torch.tensor([[1.0, -4.0, 2.0, 2.0], [0.0, 0.0, 0.0, -1.0]], requires_grad=True)
    masked = top(x, 0.5)
    assert masked.tolist() == [[0, -4, 2, 0], [0, 0, 0, -1]]
    (masked * torch.tensor([1.0, 2, 3, 4])).sum().backward()
    assert x.grad.tolist() == [[1, 2, 3, 4]] * 2  # as if all channels were there
    assert torch.equal(top(x, 0.0), x)
    assert top(x, 0.999).count_nonzero(-1).tolist() == [1, 1]


def test_the_masks_of_training_are_those_at_run_time():
    model = tiny()
    with masked_inputs(model, 0.4):
        trained = logits(model)
    with sparity.with_activations(model, IDS, method="q_sparse", sparsity=0.4, first=0) as sparse:
        assert torch.allclose(logits(sparse), trained, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert Thresholds(limit="top").kept(32, 0.4) == int(top(torch.rand(32), 0.4).count_nonzero())


# ---- the steps


def test_before_a_step_its_gradients_are_there_and_the_weights_are_as_they_were():
    weight, seen = torch.nn.Parameter(torch.tensor([1.0])), []

    def before(step):
        seen.append((step, float(weight.detach()), float(weight.grad)))

    descend({"w": weight}, lambda step: (weight * (step + 1)).sum(), Notes(), Schedule(2, 0.5), before=before)
    assert seen == [(0, 1.0, 1.0), (1, pytest.approx(0.5), 2.0)]  # Adam's first step is its rate
    assert float(weight.detach()) == pytest.approx(0.5 - 0.25 * (0.29 / 0.19) / (0.004999 / 0.001999) ** 0.5, abs=1e-6)


def by_hand(model, loss, steps, rate, batch):
    """AdamW without decay (Kingma and Ba; Loshchilov and Hutter), written out, on the weights of the blocks."""
    found = {name: parameter for name, parameter in model.named_parameters() if ".layers." in name}
    first = {name: torch.zeros_like(parameter) for name, parameter in found.items()}
    second = copy.deepcopy(first)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for step in range(steps):
        for parameter in found.values():
            parameter.requires_grad_()
        chosen = [(step * batch + number) % len(IDS) for number in range(batch)]
        gradients = torch.autograd.grad(loss(IDS[chosen], step), list(found.values()))
        now = rate * (1 + math.cos(math.pi * step / steps)) / 2
        for (name, parameter), gradient in zip(found.items(), gradients, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            parameter.requires_grad_(False).sub_(now * mean / (square.sqrt() + 1e-8))
    return {name: parameter.detach().clone() for name, parameter in found.items()}


def test_training_is_adamw_on_the_text_through_the_masks():
    model, again = tiny(), tiny()
    before = copy.deepcopy(model.state_dict())
    TopkTraining(sparsity=0.4, steps=3, rate=1e-3, batch=4).train(model, {}, IDS, Notes())
    with masked_inputs(again, 0.4):
        expected = by_hand(
            again,
            lambda ids, _: cross_entropy(again(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
            3, 1e-3, 4,
        )  # fmt: skip
    for name, weight in model.state_dict().items():
        if name in expected:
            assert torch.allclose(weight, expected[name], atol=2e-5), name
            assert not torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, before[name]), name  # embedding, last norm, head
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_a_training_that_was_killed_goes_on_with_the_same_bits():
    def train(model, work, steps=5):
        train_blocks(
            model, {}, IDS, work, lambda ids, _: next_token_loss(model, ids), steps=steps, rate=1e-3, batch=2, every=2
        )

    whole, killed, resumed = tiny(), tiny(), tiny()
    train(whole, Notes())
    notes = Notes(dies=3)
    with pytest.raises(KeyboardInterrupt):
        train(killed, notes)
    assert notes.saved[0] == 2
    again = Notes(last=notes.saved)
    train(resumed, again)
    assert again.seen == [3, 4, 5]
    assert all(
        torch.equal(*pair) for pair in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_zeros_stay_and_types_come_back(family):
    model = tiny(family).bfloat16()
    decoder, masks = Decoder.open(model), {}
    for site in sparity.models.attached_runtime.input_sites(model):
        for projection in site.projections:
            masks[projection.name] = torch.rand(projection.weight.shape) < 0.5
            projection.weight.mul_(masks[projection.name])
    before = copy.deepcopy(model.state_dict())
    TopkTraining(sparsity=0.2, steps=2, rate=1e-2, batch=2).train(model, masks, IDS, Notes())
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.bfloat16}
    changed = 0
    for site in sparity.models.attached_runtime.input_sites(model):
        for projection in site.projections:
            assert not bool(projection.weight[~masks[projection.name]].any())
    changed = sum(not torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert changed >= len(decoder) * 4


def test_a_loss_that_is_not_finite_ends_it():
    model = tiny()
    with pytest.raises(NumericalError, match="step 1: the loss is nan; lower the learning rate"):
        train_blocks(
            model, {}, IDS, Notes(), lambda ids, step: next_token_loss(model, ids) * math.nan,
            steps=2, rate=1e-3, batch=2,
        )  # fmt: skip
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ---- ReLUfication


def test_the_penalty_rises_along_half_a_sine():
    weights = [rising(step, 11, 0.0, 2.0) for step in range(11)]
    assert weights[0] == 0
    assert weights[5] == pytest.approx(1.0)
    assert weights[10] == pytest.approx(2.0)
    assert weights == sorted(weights)
    assert [rising(step, 10, 0.5, 1.0) for step in range(6)] == [0, 0, 0, 0, 0, 0]
    assert rising(9, 10, 0.5, 1.0) == pytest.approx(1.0)
    assert rising(0, 1, 0.0, 1.0) == 0


def test_magnitudes_are_those_of_the_functions_outputs_with_their_gradient():
    functions = [torch.nn.ReLU(), torch.nn.ReLU()]
    x = torch.tensor([[1.0, -2.0, 3.0, 0.0]], requires_grad=True)
    with magnitudes(functions) as sizes:
        functions[0](x)
        functions[1](-x)
    assert [float(size.detach()) for size in sizes] == [1.0, 0.5]
    sizes[0].backward()
    assert x.grad.tolist() == [[0.25, 0.0, 0.25, 0.0]]
    functions[0](x)
    assert len(sizes) == 2


@pytest.mark.parametrize(("family", "attribute"), [("llama", "hidden_act"), ("gpt2", "activation_function")])
def test_the_function_is_relu_in_the_model_and_in_its_configuration(family, attribute):
    model = tiny(family)
    assert function_attribute(model.config) == attribute
    before = copy.deepcopy(model.state_dict())
    stage = Relufication(steps=0)
    stage.train(model, {}, IDS, Notes())
    assert getattr(model.config, attribute) == "relu"
    assert stage.config_changes(Decoder.open(tiny(family))) == {attribute: "relu"}
    assert len(activation_functions(model, "")) == 3
    assert all(isinstance(getattr(*found), torch.nn.ReLU) for found in activation_functions(model, ""))
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    kept = tiny(family)
    Relufication(steps=0, function="keep").train(kept, {}, IDS, Notes())
    assert torch.equal(logits(kept), logits(tiny(family)))


def test_training_with_a_penalty_makes_the_functions_outputs_smaller():
    zeros = []
    for penalty in (0.0, 3.0):
        model = tiny()
        Relufication(steps=8, rate=3e-3, penalty=penalty, warm_up=0.0).train(model, {}, IDS, Notes())
        functions = [getattr(*found) for found in activation_functions(model, "")]
        with torch.no_grad(), magnitudes(functions) as sizes:
            model(IDS)
        zeros.append(sum(map(float, sizes)))
    assert zeros[1] < zeros[0]


def test_a_run_leaves_a_model_that_every_loader_takes_for_relu(token_files, tiny_llama_folder, tmp_path):
    stages = [
        {"prune": {"score": "magnitude", "sparsity": 0.3}},
        {"relufication": {"steps": 4, "rate": 0.003}},
        {"activations": {"method": "cats", "sparsity": 0.5}},
    ]
    recipe = {
        "model": str(tiny_llama_folder),
        "calibration": {"tokens": token_files["calibration"], "batch": 3},
        "stages": stages,
        "measure": {"speed": None},
    }
    result = sparity.run(recipe, output=tmp_path / "out", device="cpu")
    assert json.loads((result.path / "config.json").read_text())["hidden_act"] == "relu"
    model = result.model()
    assert isinstance(model.model.layers[0].mlp.act_fn, torch.nn.ReLU)
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits(model)
    handle.remove()
    assert float((seen[0] == 0).double().mean()) > 0.4  # of ReLU, and of what is skipped
    by_stage = {}
    for change in result.report.candidates[0].changes:
        by_stage.setdefault(change.stage, []).append(change)
    assert {name: len(found) for name, found in by_stage.items()} == {"prune": 21, "relufication": 21, "activations": 6}
    assert all(change.zeros >= 0.29 for change in by_stage["relufication"])


def test_what_is_refused(family_models):
    moe = Decoder.open(family_models["mixtral"])
    with pytest.raises(InvalidInput, match="several experts in one module"):
        TopkTraining().decide(moe, None)
    llama = Decoder.open(family_models["llama"])
    assert TopkTraining().decide(llama, None) == {"left_out": 0.4, "steps": 100}
    assert Relufication(steps=7).decide(llama, None) == {"function": "relu", "steps": 7}
    assert Relufication(steps=7, function="keep").decide(llama, None) == {"function": "silu", "steps": 7}
    for name in ("topk_training", "relufication"):
        stage = registry.get("stage", name)()
        assert stage.preserves == {"mask", "shapes", "tokens"}
        assert stage.words
