"""SliceGPT: a turned model computes the same, a sliced one what the paper's formula says."""

import copy

import pytest
import torch
from structure_models import TOKENS, logits, model_for, varied

import sparity
from families import build, tiny_configs
from sparity.errors import InvalidInput
from sparity.models.cuts.rotation import fold_norms, rotate
from sparity.models.cuts.whole import blocks_of, stock_problem
from sparity.models.families.base import family_of


@pytest.fixture(scope="module")
def model():
    return model_for("slicegpt").requires_grad_(False)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "mixtral", "qwen3_moe"])
def test_a_turned_model_computes_the_same(name):
    config = copy.deepcopy(tiny_configs()[name])
    config.tie_word_embeddings = name == "llama"
    dense = varied(build(config))
    turned, family = copy.deepcopy(dense), family_of(config)
    blocks = blocks_of(turned, family)
    fold_norms(turned, family, blocks)
    torch.testing.assert_close(logits(turned), logits(dense), rtol=1e-3, atol=1e-4)
    rotation, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).double())
    rotate(turned, family, blocks, rotation)
    torch.testing.assert_close(logits(turned), logits(dense), rtol=1e-3, atol=1e-4)
    assert not torch.equal(turned.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert not turned.config.tie_word_embeddings


def test_one_rotation_is_the_principal_directions_of_all_states(model):
    smaller = sparity.restructure(model, TOKENS, method="slicegpt", rotation="global", sparsity=0.5)
    assert stock_problem(smaller) is None
    assert smaller.config.hidden_size == 16
    states = []
    hooks = [layer.register_forward_pre_hook(lambda m, given: states.append(given[0])) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda m, given: states.append(given[0])))
    logits(model)
    for hook in hooks:
        hook.remove()
    x = torch.cat([state.flatten(0, 1) for state in states]).double()
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    values, vectors = torch.linalg.eigh(x.T @ x)
    basis = vectors.flip(1)[:, :16]
    embedded = model.model.embed_tokens.weight.double() @ basis
    found = smaller.model.embed_tokens.weight.double()
    torch.testing.assert_close(found.abs(), embedded.abs(), rtol=1e-3, atol=1e-4)  # an eigenvector's sign is free
    scores = sparity.structure_scores(model, TOKENS, method="slicegpt", rotation="global", damping=0.0)["hidden_size"]
    torch.testing.assert_close(scores[0], values.flip(0).float(), rtol=1e-3, atol=1e-2)


def plain_slicegpt(model, left):
    """The published method, spelled out for a Llama: logits of the sliced model on the text."""
    size = model.config.hidden_size
    layers, captured = model.model.layers, {}
    hook = layers[0].register_forward_pre_hook(lambda m, a, k: captured.update(k), with_kwargs=True)
    logits(model, TOKENS[:1])
    hook.remove()

    def pca(x):
        gram = sum(part.T @ part for part in x)
        gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(size).double()
        return torch.linalg.eigh(gram)[1].flip(1)

    def divided(x):  # by the root mean square over the old width
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / size + model.config.rms_norm_eps)

    states = model.model.embed_tokens(TOKENS).double()
    basis = pca(states)[:, :left]
    x = states @ basis
    for number, layer in enumerate(layers):
        copied = copy.deepcopy(layer).double()
        attention, mlp = copied.self_attn, copied.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight.data = (linear.weight * copied.input_layernorm.weight) @ basis
        position = tuple(part.double() for part in captured["position_embeddings"])
        output = torch.cat(
            [attention(divided(part[None]), position_embeddings=position, attention_mask=None)[0] for part in x]
        )
        between = output + x @ basis.T
        after = pca(between)[:, :left]
        x = between @ after
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.data = (linear.weight * copied.post_attention_layernorm.weight) @ after
        behind = mlp(divided(x)) + x @ after.T
        basis = pca(behind)
        basis = basis if number == len(layers) - 1 else basis[:, :left]
        x = behind @ basis
    head = (model.lm_head.weight.double() * model.model.norm.weight.double()) @ basis
    return (divided(x) @ head.T).float()


def test_the_published_method_with_matrices_on_its_shortcuts(model):
    sliced = sparity.restructure(model, TOKENS, method="slicegpt", sparsity=0.5)
    torch.testing.assert_close(logits(sliced), plain_slicegpt(model, 16), rtol=1e-2, atol=2e-3)
    assert sliced.model.layers[0].attention_shortcut.shape == (16, 16)
    assert sliced.model.layers[3].mlp_shortcut.shape == (16, 32)  # the head reads all of it
    assert stock_problem(sliced) is not None
    assert sliced.generate(TOKENS[:1], max_new_tokens=4, do_sample=False).shape == (1, 20)
    whole = sparity.restructure(model, TOKENS, method="slicegpt", sparsity=0.01, round_to=1)
    assert float((logits(whole) - logits(model)).norm() / logits(model).norm()) < 0.5


def test_what_cannot_be_turned_is_refused(model):
    for name in ("opt", "gemma2", "gpt2"):
        with pytest.raises(InvalidInput, match="cannot be turned"):
            sparity.restructure(build(tiny_configs()[name]), TOKENS, method="slicegpt", sparsity=0.5)
    with pytest.raises(InvalidInput, match="not shaped like Llama's: set `rotation: global`"):
        sparity.restructure(build(tiny_configs()["mixtral"]), TOKENS, method="slicegpt", sparsity=0.5)
    with pytest.raises(InvalidInput, match="leaves none of 32: lower it, or `round_to`"):
        sparity.restructure(model, TOKENS, method="slicegpt", sparsity=0.9)
