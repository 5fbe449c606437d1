"""Which tokens of a call are sparse, by hand and in whole models."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from families import build, tiny_configs
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.engine.modules.skips import InputSkip, OutputSkip, SparseTokens
from sparity.errors import InvalidInput

IDS = torch.arange(2, 22).view(2, 10)


@pytest.fixture
def model():
    return build(tiny_configs()["llama"])


def recorded(model, tokens, call):
    """For each call of the first layer's q: which tokens were sparse, as lists of 0 and 1 for each row."""
    found = []

    def see(module, arguments):
        flags = tokens.of(arguments[0])
        flags = torch.ones(arguments[0].shape[:-1], dtype=torch.bool) if flags is None else flags
        found.append(flags.int().tolist())

    with tokens.watch(model):
        handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(see)
        try:
            with torch.no_grad():
                call()
        finally:
            handle.remove()
    return found


def test_a_text_that_is_scored_is_sparse_after_its_first_tokens(model):
    found = recorded(model, SparseTokens(3), lambda: model(IDS, use_cache=False))
    assert found == [[[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]] * 2]


def test_padding_on_the_left_does_not_count_as_first_tokens(model):
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    found = recorded(model, SparseTokens(3), lambda: model(IDS, attention_mask=mask, use_cache=False))
    assert found == [[[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]]]


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}, {"num_beams": 2}])
def test_the_prompt_of_a_generation_is_dense_however_it_is_cut(model, options):
    found = recorded(
        model,
        SparseTokens(3),
        lambda: model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options),
    )
    rows = len(IDS) * options.get("num_beams", 1)
    assert [len(call) for call in found] == [rows] * len(found)
    assert not any(flag for call in found[:-2] for row in call for flag in row)
    assert found[-2:] == [[[1]] * rows] * 2
    assert sum(len(call[0]) for call in found[:-2]) == 10


def test_a_short_prompt_leaves_first_tokens_to_be_generated_dense(model):
    found = recorded(
        model, SparseTokens(3), lambda: model.generate(IDS[:, :1], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    )
    assert [call[0] for call in found] == [[0], [0], [0], [1], [1]]


def test_prompts_are_sparse_where_that_is_asked_for(model):
    found = recorded(
        model,
        SparseTokens(3, "sparse"),
        lambda: model.generate(IDS, max_new_tokens=1, do_sample=False),
    )
    assert found == [[[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]] * 2]


def test_a_second_turn_is_a_prompt_again_and_a_draft_is_none(model):
    def call():
        cache = DynamicCache()
        model(IDS[:1], past_key_values=cache)
        model(IDS[:1, :4], past_key_values=cache)  # another turn
        model(IDS[:1, :1], past_key_values=cache)  # a token
        model(IDS[:1, :4], past_key_values=cache, logits_to_keep=4)  # a token, and three drafted ones

    assert [call[0] for call in recorded(model, SparseTokens(2), call)] == [[0] * 10, [0] * 4, [1], [1] * 4]


def test_a_first_call_with_a_draft_is_dense_in_its_prompt_only(model):
    def call():
        model(IDS[:1], past_key_values=DynamicCache(), logits_to_keep=3)

    assert recorded(model, SparseTokens(2), call) == [[[0] * 8 + [1] * 2]]


def test_a_block_by_itself_counts_from_its_first_token(model):
    block, tokens, found = model.model.layers[0], SparseTokens(2), []
    block.register_forward_pre_hook(lambda module, arguments: found.append(tokens.of(arguments[0]).int().tolist()))
    hidden = torch.randn(1, 4, 32)
    cos_sin = model.model.rotary_emb(hidden, torch.arange(4)[None])
    with tokens.watch(block), torch.no_grad():
        block(hidden, position_embeddings=cos_sin)
    assert found == [[[0, 0, 1, 1]]]


def test_inputs_that_are_not_one_for_each_token_are_refused(model):
    tokens = SparseTokens(2)
    with tokens.watch(model):
        model.model.layers[0].mlp.register_forward_pre_hook(lambda module, arguments: tokens.of(arguments[0][:, :3]))
        with pytest.raises(InvalidInput, match=r"inputs \[2, 3, 32\] in a call of \[2, 10\] tokens"):
            model(IDS)


def test_a_hook_masks_the_sparse_tokens_alone():
    layer = nn.Linear(3, 2, bias=False)
    x = torch.tensor([[1.0, -3.0, 0.5], [1.0, -3.0, 0.5]])
    rule, tokens = SkipRule(torch.tensor(0.9), torch.tensor([0.0, 0.0, 0.25])), SparseTokens(1)
    expected = torch.tensor([[1.0, -3.0, 0.5], [1.0, -3.0, 0.25]])
    assert torch.equal(InputSkip(rule, tokens).masked(x), expected)
    layer.register_forward_pre_hook(InputSkip(rule, tokens))
    assert torch.equal(layer(x), nn.functional.linear(expected, layer.weight))
    function = nn.Identity()
    function.register_forward_hook(OutputSkip(rule, tokens))
    assert torch.equal(function(x), expected)
    assert InputSkip(rule, SparseTokens(2)).masked(x) is x  # nothing to do


def test_a_copy_follows_its_own_calls_and_the_original_is_left_as_it_was(model):
    plain = {id(module): len(module._forward_pre_hooks) for module in model.modules()}
    tokens = SparseTokens(0)
    with tokens.watch(model):
        hook = InputSkip(SkipRule(torch.tensor(torch.inf)), tokens)
        handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(hook)
        twin = copy.deepcopy(model)
        expected = model(IDS).logits
        assert torch.equal(twin.generate(IDS, max_new_tokens=2), model.generate(IDS, max_new_tokens=2))
        handle.remove()
    assert torch.equal(twin(IDS).logits, expected)
    assert {id(module): len(module._forward_pre_hooks) for module in model.modules()} == plain
    assert "_prefill" not in vars(model)
    assert not torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("family", tiny_configs())
def test_the_calls_of_every_family_are_followed(family):
    model, tokens, found = build(tiny_configs()[family]), SparseTokens(3), []
    inner = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1)[0]
    handle = inner.register_forward_pre_hook(lambda module, given: found.append(tokens.of(given[0])))
    with tokens.watch(model), torch.no_grad():
        model.generate(IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    handle.remove()
    assert not bool(found[0].any())
    assert [None if flags is None else bool(flags.all()) for flags in found[1:]] == [None]
