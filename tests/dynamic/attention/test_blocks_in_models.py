"""Prompts by blocks in whole models: masked dense attention, and the model's own bits where all blocks are chosen."""

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import sparity
from masked_dense import called, calls_of
from sparity import registry
from sparity.errors import InvalidInput, UnsupportedModel

NAMES = registry.names("attention.layout")
SMALL = {
    "local": {"window": 6},
    "a_shape": {"sinks": 4, "window": 6},
    "global": {"tokens": 4},
    "vertical_slash": {"vertical": 2, "slash": 2, "last": 4, "sinks": 1, "near": 1},
    "xattention": {"stride": 4, "threshold": 0.4},
    "flexprefill": {"gamma": 0.4, "least": 4},
    "spargeattn": {"threshold": 0.4},
}
SIZES = (25, 14, 1, 3, 1)
FAMILIES = ("llama", "qwen3", "gemma2", "phi3", "opt", "gpt_neox", "gpt2")


@pytest.fixture(scope="module")
def models(family_models):
    return {name: copy.deepcopy(family_models[name]) for name in FAMILIES}


def masked(model, calls, pads, name, block):
    """The same calls through dense attention, with every block masked that the layout does not choose."""
    size = (block, block) if isinstance(block, int) else block

    def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **more):
        rows, heads, new, width = query.shape
        tokens, group = key.shape[2], heads // key.shape[1]
        scale = width**-0.5 if scaling is None else scaling
        visible = torch.ones(rows, heads, new, tokens, dtype=torch.bool).tril(tokens - new)
        if attention_mask is not None:
            visible = visible & attention_mask[..., :tokens]
        if new >= max(size[0], 2) and more.get("sliding_window") is None:
            for row, pad in enumerate(pads):
                first = max(pad - (tokens - new), 0)
                blocks = sparity.attention_blocks(
                    query[row : row + 1, :, first:], key[row : row + 1, :, pad:],
                    method=name, block=block, scaling=scale, **SMALL.get(name, {}),
                )[0]  # fmt: skip
                chosen = blocks.repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)
                visible[row, :, first:, pad:] &= chosen[:, : new - first, : tokens - pad]
        logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~visible, -1e30)
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(rows, heads, new, 1)], -1)
        weights = logits.softmax(-1)[..., :tokens]
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_blocks", attention)
    AttentionMaskInterface.register(
        "masked_blocks", lambda *a, **k: sdpa_mask(*a, **{**k, "allow_is_causal_skip": False})
    )
    before = model.config._attn_implementation
    model.set_attn_implementation("masked_blocks")
    try:
        return called(model, calls)
    finally:
        model.set_attn_implementation(before)


def check(model, name, pads, block=4):
    calls = calls_of(pads, *SIZES)
    with sparity.with_attention_blocks(model, method=name, block=block, **SMALL.get(name, {})):
        found = called(model, calls)
    expected, dense = masked(model, calls, pads, name, block), called(model, calls)
    real = [call["attention_mask"][:, -call["input_ids"].shape[1] :].bool() for call in calls]
    for here, there, rows in zip(found, expected, real, strict=True):
        assert torch.allclose(here[rows], there[rows], atol=2e-5 * float(there.abs().max()))
    return found, dense


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_out_counts_as_if_it_were_masked(name, models):
    found, dense = check(models["llama"], name, (0, 7))
    assert not torch.allclose(found[0][0], dense[0][0], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_counts_as_if_it_were_masked_in_every_family(family, models):
    found, dense = check(models[family], "local", (0, 7), block=(3, 5))
    assert not torch.allclose(found[0][0], dense[0][0], atol=1e-4)


@pytest.mark.parametrize("block", [1, 2, (8, 1), (1, 8)])
def test_blocks_of_any_size(block, models):
    check(models["llama"], "local", (0, 7), block)


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gemma2", "eager")]
)
def test_all_blocks_give_the_models_bits(family, attention, models):
    model, calls, before = models[family], calls_of((0, 5), *SIZES), models[family].config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        dense, state = called(model, calls), model.config.to_dict()
        with sparity.with_attention_blocks(model, method="local", block=4, window=64):
            assert all(torch.equal(*pair) for pair in zip(called(model, calls), dense, strict=True))
        assert model.config.to_dict() == state
        assert all(torch.equal(*pair) for pair in zip(called(model, calls), dense, strict=True))
    finally:
        model.set_attn_implementation(before)


def test_a_padded_row_is_the_row_alone(models):
    model, calls = models["llama"], calls_of((0, 7), *SIZES)
    alone = [{"input_ids": call["input_ids"][1:]} for call in calls]
    alone[0] = {"input_ids": calls[0]["input_ids"][1:, 7:]}
    for name in ("local", "xattention", "vertical_slash"):
        with sparity.with_attention_blocks(model, method=name, block=4, **SMALL.get(name, {})):
            for together, single in zip(called(model, calls)[1:], called(model, alone)[1:], strict=True):
                assert torch.allclose(together[1:], single, atol=2e-5 * float(single.abs().max()))


@torch.no_grad()
def test_a_prompt_by_blocks_may_be_evicted_from(models):
    model, ids = models["llama"], torch.arange(3, 43)[None]
    with (
        sparity.with_attention_blocks(model, method="local", block=4, window=8),
        sparity.cache(model, "streaming_llm", 0.5, recent=2),
    ):
        past = model(ids).past_key_values
        logits = model(ids[:, :1], past_key_values=past).logits
        assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 43)
    assert past.layers[0].store.lengths.tolist() == [20] * 2
    with sparity.cache(model, "streaming_llm", 0.5, recent=2):
        dense = model(ids).past_key_values
        assert not torch.allclose(model(ids[:, :1], past_key_values=dense).logits, logits, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_done_is_refused(models):
    model = models["llama"]
    for options, words in (
        ({"method": "locl"}, 'no layout "locl"; did you mean "local"'),
        ({"method": "local", "windw": 3}, 'no option "windw"'),
        ({"method": "local", "block": 0}, "must be a number of tokens"),
        ({"method": "local", "window": 0}, "is too small"),
    ):
        with pytest.raises(InvalidInput, match=words), sparity.with_attention_blocks(model, **options):
            pass
    again = sparity.with_attention_blocks(model, method="local")
    with (
        sparity.with_attention_blocks(model, method="local"),
        pytest.raises(InvalidInput, match="at work in this model already"),
    ):
        again.__enter__()
    with sparity.cache(model, "snapkv"), pytest.raises(UnsupportedModel, match=r"put sparity.cache inside"):
        sparity.with_attention_blocks(model, method="local").__enter__()
    assert model.config._attn_implementation == "sdpa"
