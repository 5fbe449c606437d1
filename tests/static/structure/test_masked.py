"""Masks while a model runs, masks in its weights, and what is cut: three ways to the same logits."""

import copy

import pytest
import torch
from structure_models import logits, varied

from families import build, tiny_configs
from sparity.models import Decoder
from sparity.models.cuts.whole import cut_model
from sparity.static.structure.constraints import axes_of, full_sizes
from sparity.static.structure.masked import fold, mask_places, masked
from sparity.static.structure.shearing import settle

SHAPES = {
    "llama": {"mlp_channels": 40, "query_heads": 2, "hidden_size": 16, "depth": 2},
    "qwen3": {"mlp_channels": 5, "kv_groups": 1, "hidden_size": 24},
    "mistral": {"kv_groups": 1, "depth": 1},
    "phi3": {"mlp_channels": 12, "depth": 2},
    "gpt2": {"mlp_channels": 64, "depth": 2},  # with biases
    "opt": {"mlp_channels": 3, "depth": 2},
}


def model_of(family, tied=False):
    config = copy.deepcopy(tiny_configs()[family])
    config.tie_word_embeddings = tied
    return varied(build(config, seed=2)).requires_grad_(False)


def drawn_axes(model, wanted):
    """The axes of a shape, with masks in a random order."""
    decoder, generator = Decoder.open(model), torch.Generator().manual_seed(4)
    axes = axes_of(decoder, wanted)
    for axis in axes:
        axis.log_alpha.data.copy_(4 * torch.rand(axis.rows, axis.size, generator=generator) - 2)
    return axes, decoder.family


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "tied"), [*((name, False) for name in SHAPES), ("llama", True), ("qwen3", True)])
def test_running_folded_and_cut_are_one_model(family, tied):
    model = model_of(family, tied)
    axes, kind = drawn_axes(model, SHAPES[family])
    masks, dense = settle(axes), logits(model)
    assert {axis.name for axis in axes} == set(SHAPES[family])
    with masked(mask_places(model, kind), lambda: masks):
        running = logits(model)
    assert torch.equal(logits(model), dense)
    folded = copy.deepcopy(model)
    fold(mask_places(folded, kind), masks)
    close(logits(folded), running)
    smaller = cut_model(folded, {axis.name: axis.kept(model.config.num_hidden_layers) for axis in axes})
    close(logits(smaller), running)
    sizes = full_sizes(Decoder.open(smaller))
    assert {name: sizes[name] for name in SHAPES[family]} == SHAPES[family]
    assert (running - dense).abs().max() > 0.01


def test_no_masks_change_no_bit():
    model = model_of("llama")
    _, family = drawn_axes(model, {})
    with masked(mask_places(model, family), dict):
        assert torch.equal(logits(model), logits(model_of("llama")))


def test_a_block_whose_mask_is_zero_is_left_out():
    model = model_of("llama")
    _, family = drawn_axes(model, {})
    with masked(mask_places(model, family), lambda: {"depth": torch.tensor([[1.0, 0.0, 1.0]])}):
        running = logits(model)
    without = copy.deepcopy(model)
    del without.model.layers[1]
    without.model.layers[1].self_attn.layer_idx = 1
    close(running, logits(without))


def test_norms_divide_by_the_numbers_that_are_left():
    model = model_of("llama")
    _, family = drawn_axes(model, {})
    mask = torch.zeros(1, 32)
    mask[0, [1, 4, 5, 30]] = torch.tensor([1.0, 0.5, 0.25, 1.0])
    norm, seen = model.model.layers[1].mlp, []
    hook = model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    after = norm.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with masked(mask_places(model, family), lambda: {"hidden_size": mask}):
        logits(model)
    hook.remove()
    after.remove()
    stream, normed = seen
    kept = mask[0] != 0
    assert not stream[..., ~kept].any()
    assert not normed[..., ~kept].any()
    weight, epsilon = model.model.layers[1].post_attention_layernorm.weight, model.config.rms_norm_eps * 32 / 4
    x = stream[..., kept]
    by_hand = weight[kept] * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * mask[0, kept]
    close(normed[..., kept], by_hand)
