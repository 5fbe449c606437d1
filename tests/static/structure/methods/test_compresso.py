"""Compresso: its training against one written plainly, what stays frozen, what it refuses."""

import copy
import math

import pytest
import torch
from structure_models import TOKENS, check_types_and_gradients_stay, logits, model_for, varied

import sparity
from families import build, tiny_configs
from sparity.errors import InvalidInput
from sparity.models import Decoder, Projection
from sparity.models.cuts.whole import ragged_problem, stock_problem
from sparity.recipe import Recipe
from sparity.stages.base import Workload
from sparity.static.structure.constraints import Axis
from sparity.static.structure.low_ranks import stored_with
from sparity.static.structure.masked import mask_places
from sparity.static.structure.methods.compresso import Compresso
from sparity.static.structure.shearing import Training, train_masks
from sparity.static.structure.subject import Subject
from sparity.static.structure.weight_share import WeightShare, parts_of

STEPS, CHANNELS, GROUPS, HEAD = 6, 64, 2, 8
UNIT = {"mlp_channels": 3 * 32, "kv_groups": (16 + 8 + 8 + 16) * 32}  # weights of one, in a tiny Llama
BLOCK = CHANNELS * UNIT["mlp_channels"] + GROUPS * UNIT["kv_groups"]
SMALL = {"steps": STEPS, "batch": 2, "rate": 1e-2, "mask_rate": 1.0}


@pytest.fixture(scope="module")
def model():
    return model_for("compresso").requires_grad_(False)


def compresso(model, sparsity=0.3, **options):
    return sparity.restructure(model, TOKENS, method="compresso", sparsity=sparsity, **{**SMALL, **options})


def plainly(model, target):
    """The published algorithm over the modules of Llama: the merged model, the log alpha, and the multipliers."""
    model, drawn = copy.deepcopy(model), torch.Generator().manual_seed(0)
    low, z = [], []
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            first = torch.empty(8, 32)
            columns = linear.weight.double().norm(dim=0).argsort()
            first[:, columns] = torch.randn(8, 32, generator=drawn) / 32**0.5
            first, second = first.requires_grad_(), torch.zeros(len(linear.weight), 8).requires_grad_()
            low.append((linear, first, second))
            linear.register_forward_hook(lambda module, x, y, a=first, b=second: y + x[0] @ a.T @ b.T)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, x, i=index: x[0] * z[0][i])
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, x, i=index: x[0] * z[1][i].repeat_interleave(16)
        )
    log_alpha = [torch.full((4, size), math.log(100)).requires_grad_() for size in (CHANNELS, GROUPS)]
    first, second = torch.zeros(()).requires_grad_(), torch.zeros(()).requires_grad_()
    groups = [{"params": [part for _, *pair in low for part in pair], "lr": 1e-2}, {"params": log_alpha, "lr": 1.0}]
    groups.append({"params": [first, second], "lr": 1.0, "maximize": True})
    rates, optimiser = [1e-2, 1.0, 1.0], torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        share = 1.0 if step == 0 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1)))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * share
        z.clear()
        for values in log_alpha:
            u = torch.rand(values.shape, generator=generator)
            s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + values) / (2 / 3))
            z.append(torch.nn.functional.hardtanh(s * 1.2 - 0.1, 0, 1))
        ids = TOKENS[[2 * step % 3, (2 * step + 1) % 3]]
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].reshape(-1, 97), ids[:, 1:].reshape(-1))
        gone = [torch.sigmoid(2 / 3 * math.log(0.1 / 1.1) - values).sum() for values in log_alpha]
        miss = (gone[0] * UNIT["mlp_channels"] + gone[1] * UNIT["kv_groups"]) / (4 * BLOCK)
        miss = miss - min(1, step / (STEPS / 2)) * target
        optimiser.zero_grad()
        (loss + first * miss + second * miss**2).backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
        for values in log_alpha:
            values.data.clamp_(math.log(0.01), math.log(100))
    for linear, a, b in low:
        linear._forward_hooks.clear()
        linear.weight.data += (b @ a).detach()
    return model, [values.detach() for values in log_alpha]


def test_it_is_the_published_training_and_the_cut_one_is_the_dense_one_with_zeros(model):
    expected, log_alpha = plainly(model, 0.3)
    method, subject = Compresso(**SMALL), Subject(model, TOKENS)
    trained = copy.deepcopy(model)
    axes, kept = method.train(subject, trained, 0.3)
    for axis, values in zip(axes, log_alpha, strict=True):
        torch.testing.assert_close(axis.log_alpha.detach(), values, rtol=1e-3, atol=1e-3)
    smaller = method.restructure(subject, 0.3)
    assert smaller.kept == kept
    gone = sum(
        UNIT[name] * (size - len(row)) for name, size in (("mlp_channels", 64), ("kv_groups", 2)) for row in kept[name]
    )
    assert 0.3 * 4 * BLOCK - UNIT["kv_groups"] < gone <= 0.3 * 4 * BLOCK
    assert model.num_parameters() - smaller.model.num_parameters() == gone
    for index, (theirs, layer) in enumerate(zip(expected.model.layers, smaller.model.model.layers, strict=True)):
        channels, groups = kept["mlp_channels"][index], torch.tensor(kept["kv_groups"][index])
        queries = (groups[:, None] * 16 + torch.arange(16)).flatten()
        values = (groups[:, None] * HEAD + torch.arange(HEAD)).flatten()
        open_ = [torch.sigmoid(0.8 * each[index] * 3 / 2) for each in log_alpha]
        down = (theirs.mlp.down_proj.weight * open_[0])[:, channels]
        output = (theirs.self_attn.o_proj.weight * open_[1].repeat_interleave(16))[:, queries]
        for found, wanted in (
            (layer.mlp.down_proj.weight, down),
            (layer.self_attn.o_proj.weight, output),
            (layer.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight[queries]),
            (layer.self_attn.v_proj.weight, theirs.self_attn.v_proj.weight[values]),
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(smaller.model), logits(trained), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(trained), logits(model), rtol=1e-2, atol=1e-2)


def test_the_weights_stay_but_for_a_low_rank_of_q_and_v_and_masks_on_columns_of_o_and_down(model):
    trained = copy.deepcopy(model)
    axes, _ = Compresso(**SMALL, rank=3).train(Subject(model, TOKENS), trained, 0.3)
    assert not any(axis.log_alpha.grad is None for axis in axes)
    before = dict(model.named_parameters())
    for name, weight in trained.named_parameters():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "v_proj"):
            assert int(torch.linalg.matrix_rank(weight - before[name], atol=1e-5)) == 3
        elif kind in ("o_proj", "down_proj"):
            factors = weight / before[name]
            torch.testing.assert_close(factors, factors[:1].expand_as(factors))
            assert ((factors >= 0) & (factors < 1)).all()
        else:
            assert torch.equal(weight, before[name]), name
    alone = copy.deepcopy(model)
    Compresso(**{**SMALL, "rate": 0.0}).train(Subject(model, TOKENS), alone, 0.3)
    assert torch.equal(alone.model.layers[1].self_attn.q_proj.weight, model.model.layers[1].self_attn.q_proj.weight)


@pytest.mark.parametrize(
    ("family", "heads"),
    [*(("qwen3", True), ("gemma2", True)), *(("qwen2", False), ("phi3", False), ("gpt2", False))],
)
def test_other_families_are_cut_to_what_the_trained_one_computes(family, heads):
    dense = varied(build(tiny_configs()[family]))
    method = Compresso(**{**SMALL, "steps": 2, "heads": heads})
    subject, trained = Subject(dense, TOKENS), copy.deepcopy(dense)
    method.train(subject, trained, 0.4)
    smaller = method.restructure(subject, 0.4)
    assert set(smaller.kept) == ({"mlp_channels", "kv_groups"} if heads else {"mlp_channels"})
    torch.testing.assert_close(logits(smaller.model), logits(trained), rtol=1e-4, atol=1e-4)


def test_what_lies_in_one_matrix_with_a_query_has_its_low_rank():
    fused, alone = torch.nn.Linear(2, 6), torch.nn.Linear(2, 2)
    parts = [Projection(role, role, fused, rows=(2 * i, 2 * i + 2)) for i, role in enumerate("qkv")]
    parts += [Projection("o", "o", alone)]
    assert [part.name for part in stored_with(parts, ("q", "v"))] == ["q", "k", "v"]
    assert stored_with(parts, ("o",)) == parts[3:]


def test_enough_steps_bring_the_masks_to_the_share():
    config = copy.deepcopy(tiny_configs()["llama"])
    config.num_hidden_layers = 1
    found = build(config).requires_grad_(False)
    axes = [Axis("mlp_channels", 1, CHANNELS, 1), Axis("kv_groups", 1, GROUPS, 1)]
    whole = WeightShare(axes, parts_of(Subject(found, None), UNIT), 0.4)
    assert {name: parts[0].weights for name, parts in whole.parts.items()} == UNIT
    places = mask_places(found, Decoder.open(found).family)
    train_masks(found, [], places, axes, [whole], TOKENS, Training(120, 0.0, 0.5, 1, 0, 0.5))
    assert abs(float(whole.sparsity.detach()) - 0.4) < 0.05


def test_blocks_alike_or_of_their_own_sizes(model):
    alike = compresso(model, 0.5, share="block")
    assert stock_problem(alike) is None
    assert (alike.config.intermediate_size, alike.config.num_key_value_heads) == (32, 1)
    narrow = compresso(model, 0.5, share="block", heads=False)
    assert (narrow.config.intermediate_size, narrow.config.num_key_value_heads) == (32, 2)
    own = compresso(model, 0.3)
    assert stock_problem(own) is not None
    assert ragged_problem(own) is None
    assert torch.equal(logits(compresso(model, 0.01, share="block")), logits(model))  # less than a channel of a block


def test_the_seed_decides_and_types_and_gradients_are_the_models_own(model):
    assert torch.equal(logits(compresso(model)), logits(compresso(model)))
    assert not torch.equal(logits(compresso(model)), logits(compresso(model, seed=1)))
    check_types_and_gradients_stay(model, compresso)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"steps": 0}, "`steps` must be 1 or more, not 0"),
        ({"batch": 0}, "`batch` must be 1 or more"),
        ({"rank": 0}, "`rank` must be 1 or more"),
        ({"rate": -1.0}, "`rate` must be 0 or more, not -1"),
        ({"mask_rate": 0.0}, "`mask_rate` must be positive, not 0"),
        ({"alpha": math.inf}, "`alpha` must be positive"),
        ({"share": "all"}, "share"),
    ],
)
def test_options_that_make_no_sense_are_refused(model, wrong, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        compresso(model, **wrong)


def test_models_and_texts_that_do_not_do_are_refused_before_the_training(model, monkeypatch):
    monkeypatch.delattr("sparity.static.structure.methods.compresso.train_masks")
    with pytest.raises(InvalidInput, match="no rule for experts"):
        compresso(build(tiny_configs()["mixtral"]))
    with pytest.raises(InvalidInput, match="cannot say how wide a head is"):
        compresso(build(tiny_configs()["gpt2"]))
    with pytest.raises(InvalidInput, match="at least 3 tokens"):
        sparity.restructure(model, TOKENS[:, :2], method="compresso", sparsity=0.3, **SMALL)


def test_the_stage_says_what_blocks_become_and_what_training_takes(model):
    decoder = Decoder.open(model)

    def stage(shapes, **options):
        stages = [{"structure": {"method": {"compresso": {**SMALL, **options}}, "sparsity": 0.5, "shapes": shapes}}]
        return Recipe.read({"model": "zoo:llama", "stages": stages}).stages[0]

    decision = {"sizes": {"mlp_channels": 32, "kv_groups": 1}}
    assert stage("ragged").decide(decoder, None) == decision
    assert stage("uniform", share="block").decide(decoder, None) == decision
    with pytest.raises(InvalidInput, match="compresso lets blocks have different sizes"):
        stage("uniform").decide(decoder, None)
    found = stage("ragged").estimate(decoder, decision, Workload(3, 16))
    assert found.flops == 4 * 4 * BLOCK * STEPS * 2 * 16
    assert found.memory["a copy in float32"] == 4 * 4 * BLOCK
