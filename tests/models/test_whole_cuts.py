"""Whole models cut: the oracle says that the result is the dense model with the same parts set to zero."""

import copy

import pytest
import torch
from cut_models import CONFIGS, DERIVED_HEAD_WIDTH, choice, kinds, zeroed

from families import build
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.whole import blocks_of, cut_model, stock_problem

TOKENS = torch.arange(60).view(2, 30) % 97
NO_PLAIN_RMS = ("gemma2", "gemma3_text", "opt", "gpt_neox", "gpt2")


@pytest.fixture(scope="module")
def models():
    return {name: build(config) for name, config in CONFIGS.items()}


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def reloaded(model):
    """A stock model of the configuration with the cut model's tensors."""
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


def check(smaller, expected):
    assert stock_problem(smaller) is None
    torch.testing.assert_close(logits(smaller), expected, rtol=2e-4, atol=2e-4)
    assert torch.equal(logits(smaller), logits(reloaded(smaller)))
    generated = smaller.generate(TOKENS[:1, :5], max_new_tokens=8, do_sample=False, eos_token_id=-1)
    again = reloaded(smaller).generate(TOKENS[:1, :5], max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert torch.equal(generated, again)


def per_block(decoder, kept):
    names = dict.fromkeys(name for block in kept for name in block)
    return {name: [block.get(name) for block in kept] for name in names}


@pytest.mark.parametrize("name", CONFIGS)
def test_channels_and_heads(name, models):
    decoder, model = Decoder.open(models[name]), models[name]
    for kind in kinds(decoder):
        if kind != "mlp_channels" and name in DERIVED_HEAD_WIDTH:
            with pytest.raises(InvalidInput, match="cannot say how wide a head is"):
                cut_model(model, per_block(decoder, choice(decoder, kind)))
            continue
        kept = choice(decoder, kind)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        check(cut_model(model, per_block(decoder, kept)), logits(zeroed(model, decoder, kept)))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_query_heads_of_every_group(name, models):
    decoder, model = Decoder.open(models[name]), models[name]
    if "kv_groups" not in kinds(decoder) or name in DERIVED_HEAD_WIDTH:
        return
    smaller = cut_model(model, {"query_heads": [[0, 3], [1, 2], [1, 3]]})
    dense = copy.deepcopy(model)
    for block, gone in zip(blocks_of(dense, decoder.family), ([1, 2], [0, 3], [0, 2]), strict=True):
        (output,) = (projection for projection in block.projections if projection.role == "o")
        for head in gone:
            output.weight[:, 8 * head : 8 * head + 8] = 0
    assert smaller.config.num_attention_heads == smaller.config.num_key_value_heads == 2
    check(smaller, logits(dense))
    with pytest.raises(InvalidInput, match="would keep 2, 0 query heads: keep equally many of each"):
        cut_model(model, {"query_heads": [[0, 1]] * 3})


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_size(name, models):
    model, kept = models[name], torch.tensor([0, 1, 2, 3, 5, 8, 11, 14, 15, 16, 19, 21, 22, 27, 29, 31])
    if name in NO_PLAIN_RMS or name in DERIVED_HEAD_WIDTH:
        with pytest.raises(InvalidInput, match=r"hidden_size: .*: cut other dimensions"):
            cut_model(model, {"hidden_size": kept})
        return
    dense, gone = copy.deepcopy(model), [unit for unit in range(32) if unit not in kept]
    dense.get_input_embeddings().weight.data[:, gone] = 0
    for block in blocks_of(dense, Decoder.open(model).family):
        for projection in block.projections:
            if projection.role in ("o", "down"):
                projection.weight[gone] = 0
                if getattr(projection.module, "bias", None) is not None:
                    projection.module.bias.data[gone] = 0
    smaller = cut_model(model, {"hidden_size": kept})
    assert smaller.config.hidden_size == 16
    check(smaller, logits(dense))


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks(name, models):
    model = models[name]
    decoder = Decoder.open(model)
    for kept in ([0, 2], [1], [2]):
        dense = copy.deepcopy(model)
        blocks = dense.get_submodule(decoder.family.blocks)
        for index in set(range(3)) - set(kept):
            blocks[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
        smaller = cut_model(model, {"depth": kept})
        assert smaller.config.num_hidden_layers == len(kept)
        check(smaller, logits(dense))


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_silenced(name, models):
    model = models[name]
    smaller = cut_model(model, {"attention": [0, 2]})
    dense = copy.deepcopy(model)
    (output,) = (p for p in blocks_of(dense, Decoder.open(model).family)[1].projections if p.role == "o")
    output.module.register_forward_hook(lambda module, given, found: torch.zeros_like(found))
    check(smaller, logits(dense))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts(name, models):
    model = models[name]
    dense_block = [1] if name == "qwen3_moe" else []
    kept = [None if index in dense_block else units for index, units in enumerate([[0, 2, 3], [0, 1, 2], [1, 2, 3]])]
    dense = copy.deepcopy(model)
    for index, units in enumerate(kept):
        if units is None:
            continue
        router = dense.model.layers[index].mlp.gate
        (gone,) = set(range(4)) - set(units)
        router.forward = lambda hidden, router=router, gone=gone: without(router, gone, hidden)
    smaller = cut_model(model, {"experts": kept})
    check(smaller, logits(dense))
    with pytest.raises(InvalidInput, match="experts: 1 would be left, but every token visits 2: keep more"):
        cut_model(model, {"experts": [None if units is None else [0] for units in kept]})
    if dense_block:
        with pytest.raises(InvalidInput, match="has no experts"):
            cut_model(model, {"experts": [[0, 1, 2]] * 3})


def without(router, gone, hidden):
    """The router with one expert's logit at minus infinity."""
    scores = torch.nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
    scores[:, gone] = -torch.inf
    weights, chosen = scores.softmax(-1).topk(router.top_k, dim=-1)
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return scores, weights, chosen


def test_several_dimensions_at_once_and_each_block_its_own_number(models):
    model = models["llama"]
    smaller = cut_model(model, {"mlp_channels": [[0, 1], [5], None], "kv_groups": [[1], None, [0]], "depth": [0, 2]})
    decoder = Decoder.open(model)
    kept = [
        {"mlp_channels": torch.tensor([0, 1]), "kv_groups": torch.tensor([1])},
        {},
        {"kv_groups": torch.tensor([0])},
    ]
    dense = cut_model(zeroed(model, decoder, kept), {"depth": [0, 2]})
    torch.testing.assert_close(logits(smaller), logits(dense), rtol=1e-4, atol=1e-4)
    assert "the configuration says" in stock_problem(smaller)
    both = cut_model(model, {"hidden_size": range(24), "mlp_channels": [range(16)] * 3, "depth": [1, 2]})
    assert stock_problem(both) is None
    once = cut_model(model, {"depth": [1, 2]})
    twice = cut_model(cut_model(once, {"mlp_channels": [range(16)] * 2}), {"hidden_size": range(24)})
    torch.testing.assert_close(logits(both), logits(twice), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"mlp_channels": [[0]]}, "give the indices that stay for each of the 3 blocks"),
        ({"mlp_channels": [[]] * 3}, "no unit is kept|vector of whole numbers"),
        ({"mlp_channels": [[64]] * 3}, "kept units run from 64 to 64, but there are only 0 to 63"),
        ({"mlp_channels": [[1, 0]] * 3}, "unsorted or repeated"),
        ({"mlp_channels": [[0.5]] * 3}, "a vector of whole numbers"),
        ({"depth": []}, "no unit is kept|vector of whole numbers"),
        ({"depth": [0, 3]}, "only 0 to 2"),
        ({"hidden_size": [[0, 1], [0, 2], [0, 1]]}, "all blocks share one choice"),
        ({"head_width": [[0]] * 3}, 'has no dimension "head_width"'),
        ({"experts": [[0, 1]] * 3}, "has no experts"),
        ([1, 2], "kept maps dimensions"),
    ],
)
def test_what_is_no_choice_of_units_is_refused(kept, words, models):
    with pytest.raises(InvalidInput, match=words):
        cut_model(models["llama"], kept)


def test_tied_embeddings_stay_tied_and_biases_go_along(models):
    config = copy.deepcopy(CONFIGS["llama, a key per query, biases"])
    config.tie_word_embeddings = True
    smaller = cut_model(build(config), {"hidden_size": range(0, 32, 2)})
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    assert smaller.lm_head.weight.shape == (97, 16)
    assert smaller.model.layers[0].mlp.down_proj.bias.shape == (16,)
    assert smaller.model.layers[0].mlp.up_proj.bias.shape == (64,)
    assert stock_problem(smaller) is None
