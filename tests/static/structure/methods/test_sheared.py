"""Sheared LLaMA: its training against one written plainly, the shapes that it leaves, and what it refuses."""

import copy
import math

import pytest
import torch
from structure_models import TOKENS, logits, model_for

import sparity
from families import build, tiny_configs
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.whole import stock_problem
from sparity.recipe import Recipe
from sparity.stages.base import Workload
from sparity.static.structure.constraints import Axis
from sparity.static.structure.masked import mask_places
from sparity.static.structure.methods.sheared import Sheared
from sparity.static.structure.shearing import Training, shear

STEPS, CHANNELS = 6, 64
SMALL = {"steps": STEPS, "batch": 2, "rate": 1e-3}


@pytest.fixture(scope="module")
def model():
    return model_for("sheared").requires_grad_(False)


def sheared(model, **options):
    return sparity.restructure(model, TOKENS, method="sheared", sparsity=0.5, **{**SMALL, **options})


def plainly(model, left):
    """MLP channels by the published algorithm, over the modules of Llama: weights, log alpha, multipliers."""
    model = copy.deepcopy(model).requires_grad_(True)
    log_alpha = torch.nn.Parameter(torch.full((4, CHANNELS), math.log(100)))
    first, second = torch.nn.Parameter(torch.tensor(0.0)), torch.nn.Parameter(torch.tensor(0.0))
    groups = [{"params": list(model.parameters()), "lr": 1e-3}, {"params": [log_alpha], "lr": 1.0}]
    groups.append({"params": [first, second], "lr": 1.0, "maximize": True})
    optimiser, generator = (
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0),
        torch.Generator().manual_seed(0),
    )
    rates, z = [1e-3, 1.0, 1.0], []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, x, i=index: x[0] * z[-1][i])
    for step in range(STEPS):
        share = 1.0 if step == 0 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1)))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * share
        u = torch.rand(4, CHANNELS, generator=generator)
        s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / (2 / 3))
        z.append(torch.nn.functional.hardtanh(s * 1.2 - 0.1, 0, 1))
        ids = TOKENS[[2 * step % 3, (2 * step + 1) % 3]]
        found = model(ids).logits
        loss = torch.nn.functional.cross_entropy(found[:, :-1].reshape(-1, 97), ids[:, 1:].reshape(-1))
        sparsity = torch.sigmoid(2 / 3 * math.log(0.1 / 1.1) - log_alpha).mean(1)
        miss = sparsity - min(1, step / (0.2 * STEPS)) * (1 - left / CHANNELS)
        optimiser.zero_grad()
        (loss + (first * miss + second * miss**2).mean()).backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
        log_alpha.data.clamp_(math.log(0.01), math.log(100))
    return model, log_alpha, first, second


def test_training_is_the_published_one(model):
    expected, log_alpha, first, second = plainly(model, left=24)
    found, axis = copy.deepcopy(model), Axis("mlp_channels", 4, CHANNELS, 24)
    losses = shear(
        found, mask_places(found, Decoder.open(found).family), [axis], TOKENS, Training(STEPS, 1e-3, 1.0, 2, 0)
    )
    assert len(losses) == STEPS
    torch.testing.assert_close(axis.log_alpha, log_alpha, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(axis.linear, first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(axis.squared, second, rtol=1e-4, atol=1e-5)
    assert float(second.detach()) > 1  # it only climbs
    for (name, after), wanted in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(after, wanted.detach(), rtol=1e-3, atol=1e-4, msg=name)
    scores = sparity.structure_scores(model, TOKENS, method="sheared", mlp_channels=24, **SMALL)
    torch.testing.assert_close(scores["mlp_channels"], log_alpha.detach(), rtol=1e-3, atol=1e-3)


def test_rates_rise_and_fall_and_the_targets_grow():
    training = Training(steps=100, rate=1.0, mask_rate=1.0, batch=1, seed=0)
    assert [training.schedule(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert training.schedule(55) == pytest.approx(0.55)
    assert [training.grown(step) for step in (0, 5, 20, 99)] == [0, 0.25, 1, 1]


@pytest.mark.parametrize(
    "shape",
    [
        {"mlp_channels": 1},
        {"depth": 1, "hidden_size": 4},
        {"query_heads": 2, "mlp_channels": 63},
        {"kv_groups": 1, "depth": 3, "hidden_size": 20, "mlp_channels": 17},
    ],
)
def test_the_shape_is_the_one_that_was_asked_for(model, shape):
    smaller = sheared(model, **shape)
    config = smaller.config
    groups = shape.get("kv_groups", 2)
    assert config.num_hidden_layers == shape.get("depth", 4)
    assert config.hidden_size == shape.get("hidden_size", 32)
    assert config.intermediate_size == shape.get("mlp_channels", 64)
    assert (config.num_key_value_heads, config.head_dim) == (groups, 8)
    assert config.num_attention_heads == shape.get("query_heads", 2 * groups)
    assert stock_problem(smaller) is None
    assert torch.isfinite(logits(smaller)).all()


def test_masks_alone_leave_the_weights(model):
    smaller = sheared(model, mlp_channels=40, rate=0.0)
    for before, after in zip(model.model.layers, smaller.model.layers, strict=True):
        rows = before.mlp.up_proj.weight
        kept = [int((rows == row).all(1).nonzero()) for row in after.mlp.up_proj.weight]
        assert torch.equal(after.mlp.gate_proj.weight, before.mlp.gate_proj.weight[kept])
        factors = after.mlp.down_proj.weight / before.mlp.down_proj.weight[:, kept]
        torch.testing.assert_close(factors, factors[:1].expand_as(factors))
        assert ((factors > 0) & (factors < 1)).all()
        assert torch.equal(after.self_attn.o_proj.weight, before.self_attn.o_proj.weight)
    trained = sheared(model, mlp_channels=40)
    assert not torch.equal(trained.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_enough_steps_bring_the_masks_to_the_target():
    config = copy.deepcopy(tiny_configs()["llama"])
    config.num_hidden_layers = 1
    found, axis = build(config), Axis("mlp_channels", 1, CHANNELS, 32)
    places = mask_places(found, Decoder.open(found).family)
    shear(found, places, [axis], TOKENS, Training(steps=200, rate=0.0, mask_rate=1.0, batch=1, seed=0))
    assert (axis.sparsity - 0.5).abs().max() < 0.05


def test_types_and_seeds(model):
    half = copy.deepcopy(model).bfloat16()
    smaller = sheared(half, depth=3)
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16}
    assert not torch.equal(logits(sheared(model, seed=1)), logits(sheared(model, seed=2)))


def test_sizes_that_are_there_already_take_no_training(model):
    assert torch.equal(logits(sheared(model, depth=4, mlp_channels=64)), logits(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 5}, "depth of this model can become 1 to 4, not 5"),
        ({"mlp_channels": 0}, "mlp_channels of this model can become 1 to 64, not 0"),
        ({"hidden_size": 30}, "30.*not a multiple of the number of attention heads"),
        ({"query_heads": 3}, "3 query heads cannot be shared out equally among 2 key-value heads"),
        ({"query_heads": 2, "kv_groups": 1}, "kv_groups take their query heads with them"),
        ({"steps": 0}, "steps and batch must be 1 or more"),
        ({"rate": -1.0}, "rate 0 or more"),
        ({"mask_rate": 0.0}, "mask_rate must be positive"),
    ],
)
def test_shapes_and_options_that_make_no_sense_are_refused(model, options, message):
    with pytest.raises(InvalidInput, match=message):
        sheared(model, **options)


def test_models_that_cannot_become_the_shape_are_refused():
    tokens = TOKENS
    gpt2 = build(tiny_configs()["gpt2"])
    with pytest.raises(InvalidInput, match="cannot say how wide a head is"):
        sparity.restructure(gpt2, tokens, method="sheared", sparsity=0.5, query_heads=2, **SMALL)
    with pytest.raises(InvalidInput, match="cannot say how wide a head is"):
        sparity.restructure(gpt2, tokens, method="sheared", sparsity=0.5, hidden_size=16, **SMALL)
    with pytest.raises(InvalidInput, match='no dimension "kv_groups" in this model'):
        sparity.restructure(gpt2, tokens, method="sheared", sparsity=0.5, kv_groups=1, **SMALL)
    with pytest.raises(InvalidInput, match="no rule for experts"):
        sparity.restructure(build(tiny_configs()["mixtral"]), tokens, method="sheared", sparsity=0.5, **SMALL)
    with pytest.raises(InvalidInput, match="samples of at least 3 tokens"):
        sparity.restructure(gpt2, tokens[:, :2], method="sheared", sparsity=0.5, depth=1, **SMALL)


def test_the_stage_says_the_shape_and_what_training_takes(model):
    stages = [{"structure": {"method": {"sheared": {"depth": 3, "mlp_channels": 48, **SMALL}}}}]
    (stage,) = Recipe.read({"model": "zoo:llama", "stages": stages}).stages
    assert stage.words == "sheared, depth 3, mlp_channels 48"
    assert Sheared().words(0.25) == "25%"
    decoder = Decoder.open(model)
    decision = stage.decide(decoder, None)
    assert decision == {"sizes": {"depth": 3, "mlp_channels": 48}}
    found = stage.estimate(decoder, decision, Workload(3, 16))
    weights = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    assert found.flops == 6 * weights * STEPS * 2 * 16
    assert found.memory["weights, gradients and moments"] == 16 * weights
