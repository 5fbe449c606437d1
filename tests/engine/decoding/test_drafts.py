"""Drafts of an assistant or prompt lookup: checked with the bits of single steps, whatever the rotary scaling."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

import sparity
from families import build, tiny_configs
from quick_models import decoded
from sparity.engine.decoding import drafts
from sparity.engine.decoding.model import fallbacks
from sparity.engine.kernels import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
LEARNED = 16  # tokens, the length that scalings start from
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LEARNED}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LEARNED}
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "llama3": {"rope_type": "llama3", "factor": 8.0, **BANDS},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": LEARNED, **FACTORS},
}
GREEDY = {
    "do_sample": False,
    "pad_token_id": 0,
    "max_new_tokens": 20,
    "min_new_tokens": 20,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.fixture(scope="module")
def scaled():
    """A function that gives a small Llama in bfloat16 by its rotary scaling, and in float32 if asked."""
    made = {}

    def make(kind, dtype=torch.bfloat16):
        if kind not in made:
            config = tiny_configs()["llama"]
            config.head_dim, config.max_position_embeddings = 16, LEARNED
            config.rope_parameters = {"rope_theta": 10000.0, **SCALINGS[kind]}
            made[kind] = build(config)
            for parameter in made[kind].parameters():
                parameter.data = parameter.data.bfloat16()
        model = copy.deepcopy(made[kind])
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    return make


def text(tokens, seed=0, batch=1):
    """Tokens that repeat often, so that prompt lookup finds drafts."""
    return torch.randint(3, 7, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens, cache, **options):
    with torch.no_grad():
        return model(tokens, past_key_values=cache, use_cache=True, **options).logits


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize(("prompt", "lookup"), [(5, 10), (14, 2), (40, 10)])
def test_prompt_lookup_gives_the_tokens_and_bits_of_greedy_decoding(scaled, calls, kind, prompt, lookup):
    model, tokens = sparity.attach(scaled(kind), form="bitmask"), text(prompt, seed=prompt)
    alone = model.generate(tokens, **GREEDY)
    calls.clear()
    drafted = model.generate(tokens, prompt_lookup_num_tokens=lookup, **GREEDY)
    assert any(fresh > 1 for _, fresh in calls[1:])
    assert torch.equal(drafted.sequences, alone.sequences)
    assert torch.equal(torch.stack(drafted.logits), torch.stack(alone.logits))


@pytest.mark.parametrize(
    ("before", "prompt", "drafted"),
    [
        (0, 5, 4),  # all within the length that was learned
        (0, 12, 9),  # the draft goes beyond it
        (0, 20, 3),
        (0, 40, 5),  # the prompt is read by the model's own code
        (0, 40, 45),  # and the draft is longer than the fast path takes at once
        (20, 1, 8),  # the token that a step would take, then the draft
        (9, 1, 40),
        (20, 40, 6),  # a conversation goes on
    ],
)
@pytest.mark.parametrize(("kind", "values"), [*((kind, "same") for kind in SCALINGS), ("dynamic", "int8")])
def test_a_draft_has_the_bits_of_single_steps(scaled, kind, before, prompt, drafted, values):
    model = sparity.attach(scaled(kind), form="dense", values=values)
    tokens = text(before + prompt + drafted)
    start, at = tokens[:, :before], before + prompt
    found = []
    for size in (drafted, 1):
        cache = DynamicCache(config=model.config)
        if before:
            logits(model, start, cache)
        first = at + drafted if size > 1 else at
        out = [logits(model, tokens[:, before:first], cache, logits_to_keep=first - at + 1)]
        out += [logits(model, tokens[:, i : i + 1], cache) for i in range(first, at + drafted)]
        found.append((torch.cat(out, 1), cache.layers))
    (together, ours), (single, wanted) = found
    assert together.shape[1] == drafted + 1
    assert torch.equal(together, single)
    assert all(
        torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in zip(ours, wanted, strict=True)
    )


@pytest.mark.parametrize("kind", SCALINGS)
def test_rows_with_left_padding_check_drafts_too(scaled, kind):
    model, tokens = sparity.attach(scaled(kind)), text(30, batch=3)
    mask = torch.ones_like(tokens)
    mask[0, :7] = mask[2, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for size in (14, 1):
        cache, out = DynamicCache(config=model.config), []
        for first, last in [(0, 16), *((at, at + size) for at in range(16, 30, size))]:
            seen = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
            out.append(logits(model, tokens[:, first:last], cache, logits_to_keep=size if first else 1, **seen))
        found.append(torch.cat([out[0][:, -1:], *out[1:]], 1))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", SCALINGS)
def test_steps_are_as_exact_as_transformers_with_every_scaling(scaled, steps, kind):
    tokens = text(40, batch=2)
    exact, plain = decoded(scaled(kind, torch.float32), tokens), decoded(scaled(kind), tokens)
    found = decoded(sparity.attach(scaled(kind)), tokens)
    assert (found - exact).abs().max() <= 1.5 * (plain - exact).abs().max() + 1e-3
    assert steps == [2] * 36


@pytest.mark.parametrize("kind", ["default", "dynamic", "longrope"])
@pytest.mark.parametrize("prompt", [LEARNED - 1, LEARNED, LEARNED + 1, 40])
def test_what_a_model_did_before_changes_nothing(scaled, kind, prompt):
    model, other = sparity.attach(scaled(kind)), sparity.attach(scaled(kind))
    model.generate(text(60), **GREEDY)
    model.generate(text(20), **GREEDY)
    found, wanted = (one.generate(text(prompt, 1), **GREEDY) for one in (model, other))
    assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))


def test_a_draft_that_the_fast_path_does_not_take_is_read_at_once(scaled):
    model = sparity.attach(scaled("default"))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        found = model(text(40), past_key_values=cache, logits_to_keep=5, output_hidden_states=True)
    assert found.hidden_states[1].shape[1] == 40
    assert sum(fallbacks(model).values()) == 1
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    logits(model, text(40), DynamicCache(config=model.config), logits_to_keep=5)
    handle.remove()
    assert sum(fallbacks(model).values()) == 2


def test_another_model_in_the_place_of_the_one_that_was_attached_is_not_told(scaled):
    model, other = sparity.attach(scaled("default")), scaled("default")
    wanted = other(text(9), logits_to_keep=3).logits
    model.model = other.model
    torch.testing.assert_close(model(text(9), logits_to_keep=3).logits, wanted, rtol=0.05, atol=0.05)


def test_nothing_is_left_of_it_on_a_model_that_is_taken_off(scaled):
    model = scaled("default")
    with sparity.attached(model):
        sparity.attach(model)
        assert list(model._forward_pre_hooks.values()) == [drafts.mark]
    sparity.engine.decoding.model.disable_fast_path(model)
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs
    assert type(model.lm_head) is torch.nn.Linear


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_parts_cover_a_call_and_fit(data):
    fresh = data.draw(st.integers(2, 200))
    drafted = data.draw(st.integers(1, fresh - 1))
    length, most = data.draw(st.integers(0, 50)), data.draw(st.integers(1, 32))
    by_length = data.draw(st.booleans())
    sizes = drafts.parts(fresh, drafted, length, most, by_length)
    assert sum(sizes) == fresh
    assert all(sizes)
    if len(sizes) > 1:
        prompt = fresh - drafted
        assert all(size <= most for size in sizes[1:])
        assert sizes[0] == prompt or (length and prompt == 1 and sizes[0] <= most)
    else:
        assert fresh <= most
        assert length or not by_length
