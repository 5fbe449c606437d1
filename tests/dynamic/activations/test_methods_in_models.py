"""Every method in whole models: the dense bits, nothing but biases, and the share it promises on text it never saw."""

import pytest
import torch

import sparity
from packed_folders import logits
from sparity import registry
from sparity.dynamic.activations.methods.base import RuleMethod
from sparity.dynamic.activations.places import places_of
from sparity.dynamic.activations.stage import Activations
from sparity.models.attached_runtime import input_sites
from sparity.pipeline.run.job import prepare
from sparity.recipe import Recipe

GATE = ("gate_output", "gate_output")
METHODS = registry.names("activations.method")
RULES = [name for name in METHODS if issubclass(registry.get("activations.method", name), RuleMethod)]
RANDOM = torch.arange(96).view(4, 24) % 97


def sites_of(name):
    return registry.get("activations.method", name).where


@pytest.mark.parametrize("name", METHODS)
def test_at_sparsity_0_the_logits_are_the_dense_ones_bit_for_bit(name, family_models):
    model = family_models["llama"]
    dense = logits(model)
    with sparity.with_activations(model, RANDOM, method=name, sparsity=0.0, sites=None, first=0):
        assert torch.equal(logits(model), dense)
    with sparity.with_activations(model, RANDOM, method=name, sparsity=0.5, sites=None, first=0):
        assert not torch.equal(logits(model), dense)
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("name", RULES)
def test_behind_infinite_thresholds_only_the_biases_are_left(name, family_models):
    model = family_models["opt"]
    (place,) = (p for p in places_of(model, input_sites(model), ["fc1"]) if ".0." in p.name)
    stage = Activations(method=name, sparsity=0.5, sites=["fc1"], first=0)
    data = {f"{p.name}.threshold": torch.tensor(torch.inf) for p in places_of(model, input_sites(model), ["fc1"])}
    found = []
    hook = place.module.register_forward_hook(lambda module, inputs, output: found.append(output))
    with stage.attach(model, input_sites(model), data):
        logits(model)
    hook.remove()
    assert torch.equal(found[0].reshape(-1, place.module.out_features)[0], place.module.bias)
    assert bool((found[0] == place.module.bias).all())


def test_two_stages_act_together_and_leave_one_after_the_other(family_models):
    model = family_models["llama"]
    prompt, dense, before = RANDOM[:1, :20], logits(model), dict(vars(model))
    with sparity.with_activations(model, RANDOM, method="chess", sparsity=0.5, sites=None):
        one = logits(model)
        with sparity.with_activations(model, RANDOM, method="teal", sparsity=0.5, sites=["q", "o"]):
            both = logits(model)
            model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(logits(model), one)
        assert not torch.equal(both, one)
    assert torch.equal(logits(model), dense)
    assert vars(model).keys() == before.keys()


# ---- on a trained model


@pytest.fixture(scope="module")
def activations():
    """Of blocks 0 and 4 of the bundled model: what each place sees of both texts, and its partner."""
    model, seen = sparity.load("zoo:llama"), {}
    blocks = {index: model.model.layers[index] for index in (0, 4)}

    def note(key):
        return lambda module, inputs, output=None: seen.setdefault(key, []).append(
            (inputs[0] if output is None else output).detach()
        )

    handles = []
    for index, block in blocks.items():
        for role, module in (
            ("q", block.self_attn.q_proj),
            ("o", block.self_attn.o_proj),
            ("gate", block.mlp.gate_proj),
            ("down", block.mlp.down_proj),
        ):
            handles.append(module.register_forward_pre_hook(note((index, role))))
        handles.append(block.mlp.act_fn.register_forward_hook(note((index, "gate_output"))))
        handles.append(block.mlp.up_proj.register_forward_hook(note((index, "up_output"))))
    for text in ("calibration", "held-out"):
        calibration = {"text": f"python-docs:{text}", "documents": "joined", "samples": 32, "length": 256}
        recipe = Recipe.read({"model": "zoo:llama", "calibration": calibration, "stages": [{"activations": {}}]})
        with torch.no_grad():
            model(prepare(recipe).tokens)
    for handle in handles:
        handle.remove()
    weights = {
        (index, role): module.weight.detach()
        for index, block in blocks.items()
        for role, module in (
            ("q", block.self_attn.q_proj),
            ("o", block.self_attn.o_proj),
            ("gate", block.mlp.gate_proj),
            ("down", block.mlp.down_proj),
            ("gate_output", block.mlp.down_proj),
        )
    }
    return seen, weights


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
@pytest.mark.parametrize("name", METHODS)
def test_on_other_text_about_the_share_that_was_asked_for_is_skipped(name, sparsity, activations):
    seen, weights = activations
    every = [(4, role) for role in ("q", "o", "gate", "down")]
    places = {
        "all": every,
        "hidden": [(0, "down"), (4, "down")],
        "neurons": [(0, "down"), (4, "down")],
        "gate_output": [(0, "gate_output"), (4, "gate_output")],
    }
    realised = []
    for key in places[sites_of(name)]:
        calibration, held_out = seen[key][0][:, ::2], seen[key][1][:, 4::8]  # the first tokens stay dense
        partner = seen[key[0], "up_output"][0][:, ::2] if key[1] == "gate_output" else None
        options = {
            "statistical_topk": {"reference": False},  # as at the places of a model
            "dejavu": {"steps": 10},
        }.get(name, {})
        fitted = sparity.fit_activations(
            calibration, weights[key], method=name, sparsity=sparsity, partner=partner, **options
        )
        realised.append(1 - float(fitted.keep(held_out).double().mean()))
    assert sum(realised) / len(realised) == pytest.approx(sparsity, abs=0.02)
    assert realised == pytest.approx([sparsity] * len(realised), abs=0.03)
