"""Several new tokens of each row in one call: short prompts, left padding, drafts that are checked and taken back."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

import sparity
from families import FAST
from quick_models import cache_of
from sparity.engine.decoding.fast_path import MOST_TOKENS
from sparity.engine.decoding.model import fallbacks
from sparity.engine.kernels import native
from sparity.engine.kernels.skip.cpu import NativeSkip
from sparity.engine.kernels.skip.reference import SkipRule

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
TOKENS = torch.arange(26).reshape(2, 13) % 97
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, "min_new_tokens": 12}


def hidden(model, tokens, cache, **options):
    with torch.no_grad():
        return model.model(input_ids=tokens, past_key_values=cache, **options).last_hidden_state


@pytest.mark.parametrize("family", sorted(FAST))
@pytest.mark.parametrize("form", ["bitmask", "columns", "dense"])
def test_a_chunk_gives_the_bits_of_single_steps(tiny, calls, family, form):
    model = sparity.attach(tiny(family), form=form)
    chunks, single = DynamicCache(config=model.config), DynamicCache(config=model.config)
    together = torch.cat([hidden(model, part, chunks) for part in TOKENS.split((7, 1, 5), 1)], 1)
    alone = torch.cat([hidden(model, TOKENS[:, at : at + 1], single) for at in range(13)], 1)
    assert torch.equal(together, alone)
    for layer, other in zip(chunks.layers, single.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
    assert calls == [(2, 7), (2, 1), (2, 5), *[(2, 1)] * 13]


def test_prompts_of_unlike_lengths_in_one_batch(tiny, calls):
    model = sparity.attach(tiny("qwen3"))
    alone = hidden(model, TOKENS[:1, 4:], DynamicCache(config=model.config))
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both = hidden(model, TOKENS, DynamicCache(config=model.config), attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(both[0, 4:], alone[0], rtol=0.02, atol=0.02)
    assert not torch.allclose(both[1, 4:], alone[0], rtol=0.1, atol=0.1)
    assert calls == [(1, 9), (2, 13)]


@pytest.mark.parametrize("masked", [False, True])
def test_a_chunk_is_as_exact_as_the_models_own_code(tiny, calls, masked):
    plain, exact = tiny("llama"), tiny("llama").float()
    model = sparity.attach(tiny("llama"), form="dense")
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, :3] = 0
    options = {"attention_mask": mask} if masked else {}
    found = []
    for one in (model, plain, exact):
        cache = cache_of(one, TOKENS[:, :6])
        found.append(hidden(one, TOKENS[:, 6:], cache, **options).float())
    ours, theirs, wanted = found
    assert (ours - wanted).abs().max() <= 1.5 * (theirs - wanted).abs().max() + 1e-3
    assert calls == [(2, 6), (2, 7)]


def test_long_prompts_take_the_models_own_code(tiny, calls):
    model, tokens = sparity.attach(tiny("llama")), torch.arange(MOST_TOKENS + 1)[None] % 97
    hidden(model, tokens[:, 1:], DynamicCache(config=model.config))
    assert calls == [(1, MOST_TOKENS)]
    hidden(model, tokens, DynamicCache(config=model.config))
    assert len(calls) == 1
    assert fallbacks(model) == {f"1 x {MOST_TOKENS + 1} new tokens; the fast path takes 1 to {MOST_TOKENS}": 1}


def test_tokens_are_taken_back(tiny):
    model = sparity.attach(tiny("llama"))
    cache, straight = DynamicCache(config=model.config), DynamicCache(config=model.config)
    hidden(model, TOKENS[:, :5], cache)
    hidden(model, TOKENS[:, 8:12], cache)  # a draft, of which one token is right
    cache.crop(-4)
    found = hidden(model, TOKENS[:, 5:], cache)
    hidden(model, TOKENS[:, :5], straight)
    assert torch.equal(found, hidden(model, TOKENS[:, 5:], straight))
    assert cache.get_seq_length() == 13


@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_a_draft_changes_no_token(tiny, calls, helper):
    model, prompt = sparity.attach(tiny("llama")), torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    alone = model.generate(prompt, **GREEDY)
    calls.clear()
    options = {"prompt_lookup_num_tokens": 3}
    if helper == "assistant":
        options = {"assistant_model": sparity.attach(tiny("llama"))}
    assert torch.equal(model.generate(prompt, **GREEDY, **options), alone)
    assert any(fresh > 1 for _, fresh in calls[1:])


def test_a_model_that_is_not_causal_reads_prompts_itself(tiny, calls):
    model = sparity.attach(tiny("llama"))
    model.config.is_causal = False
    cache = cache_of(model, TOKENS[:, :6])
    assert calls == []
    hidden(model, TOKENS[:, 6:7], cache)
    assert calls == [(2, 1)]
    assert fallbacks(model) == {"attention is not causal": 1}


def test_every_reason_is_counted(tiny):
    model = sparity.attach(tiny("llama"))
    cache = cache_of(model, TOKENS)
    hidden(model, TOKENS, cache)
    assert fallbacks(model) == {}
    model(TOKENS)
    hidden(model, TOKENS, None)
    hidden(model, TOKENS, cache, output_attentions=True)
    hidden(model, TOKENS, cache, output_attentions=True)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    hidden(model, TOKENS, cache)
    handle.remove()
    assert fallbacks(model) == {
        "gradients are recorded": 1,
        "there is no key-value cache": 1,
        "the call asks for output_attentions": 2,
        "modules have hooks, or another forward": 1,
    }
    sparity.attach(model)
    assert fallbacks(model) == {}
    assert fallbacks(tiny("llama")) == {}


def test_a_model_that_is_never_fast_says_why_each_time(tiny):
    model = sparity.attach(tiny("gpt2"))
    model.generate(TOKENS[:, :3], **GREEDY)
    ((reason, count),) = fallbacks(model).items()
    assert "GPT2Model is none of" in reason
    assert count == 12


def test_a_model_on_the_engine_is_one_graph(tiny):
    model = sparity.attach(tiny("llama"), form="bitmask")
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS), model(TOKENS, use_cache=False).logits, rtol=0.05, atol=0.02)
    assert fallbacks(model) == {"there is no key-value cache": 1}  # calls that are compiled are not counted


SITES = {
    "attention": ("q", "k", "v"),
    "o": ("o",),
    "mlp": ("gate", "up"),
    "down": ("down",),
    "each its own": native.PROJECTIONS,
    "some": ("q", "v", "up"),
}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("form", ["dense", "columns"])
def test_channels_that_do_not_count_are_left_out(tiny, calls, site, centred, form):
    """Against the model in PyTorch whose projections get inputs that the rule has masked."""
    plain, kept = tiny("llama"), []
    model = sparity.attach(tiny("llama"), form=form)
    cache_of(model, TOKENS)  # the step is made
    calls.clear()
    dense = hidden(plain, TOKENS, DynamicCache(config=plain.config))
    blocks = blocks_of(model)
    for index, (block, layer) in enumerate(zip(blocks, plain.model.layers, strict=True)):
        for number, name in enumerate(SITES[site]):
            own = site in ("each its own", "some")
            projection = next(module for path, module in layer.named_modules() if path.endswith(f"{name}_proj"))
            columns = projection.in_features
            if number == 0 or own:
                generator = torch.Generator().manual_seed(10 * index + number)
                thresholds = torch.where(torch.rand(columns, generator=generator) < 0.3, 1e9, 0.0)  # never near one
                centre = torch.randn(columns, generator=generator).bfloat16() if centred else None
                rule = SkipRule(thresholds, centre)
                skip = NativeSkip(rule, columns)
            kept.append(skip)
            setattr(block, f"{name}_skip", skip.address)
            projection.register_forward_pre_hook(lambda _, inputs, rule=rule: (rule.apply(inputs[0]),))
    found = hidden(model, TOKENS, DynamicCache(config=model.config)).float()
    wanted = hidden(plain, TOKENS, DynamicCache(config=plain.config)).float()
    assert calls == [(2, 13)]
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    assert (found - dense.float()).abs().mean() > 0.05


def test_of_whole_tokens_nothing_is_left_out(tiny, calls, monkeypatch):
    model, kept = sparity.attach(tiny("llama"), form="columns"), []

    def states():
        return hidden(model, TOKENS, DynamicCache(config=model.config))

    cache_of(model, TOKENS)  # the step is made
    dense = states()
    layer = model.model.layers[0]
    inputs = {
        f"{name.removesuffix('_proj')}_skip": projection.prepared.packed.shape[1]
        for part in (layer.self_attn, layer.mlp)
        for name, projection in part.named_children()
        if name.endswith("_proj")
    }
    for name, columns in {**inputs, "neuron_skip": inputs["down_skip"]}.items():
        kept.append(NativeSkip(SkipRule(torch.tensor(torch.inf)), columns))
        for block in blocks_of(model):
            setattr(block, name, kept[-1].address)
    assert not torch.equal(states(), dense)
    whole = torch.ones(TOKENS.numel(), dtype=torch.uint8)
    step = native.Step
    monkeypatch.setattr(native, "Step", lambda **fields: step(**fields | {"whole": whole.data_ptr()}))
    torch.testing.assert_close(states(), dense, rtol=0.05, atol=0.02)
    assert calls[-2:] == [(2, 13)] * 2


@pytest.mark.parametrize("form", ["dense", "bitmask"])
def test_neurons_that_do_not_count_are_left_out(tiny, calls, form):
    """Against the model in PyTorch whose activations the rule has masked; whole tokens keep all."""
    plain, model = tiny("llama"), sparity.attach(tiny("llama"), form=form)
    cache_of(model, TOKENS)
    calls.clear()
    dense = hidden(plain, TOKENS, DynamicCache(config=plain.config))
    neurons = plain.config.intermediate_size
    thresholds = torch.where(torch.rand(neurons, generator=torch.Generator().manual_seed(0)) < 0.6, 1e9, 0.0)
    rule = SkipRule(thresholds)
    skip = NativeSkip(rule, neurons)
    for block, layer in zip(blocks_of(model), plain.model.layers, strict=True):
        block.neuron_skip = skip.address
        layer.mlp.act_fn.register_forward_hook(lambda _, inputs, out: rule.apply(out))
    found = hidden(model, TOKENS, DynamicCache(config=model.config)).float()
    wanted = hidden(plain, TOKENS, DynamicCache(config=plain.config)).float()
    assert calls == [(2, 13)]
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    assert (found - dense.float()).abs().mean() > 0.05


def bits(numbers):
    """What lies in memory, also where nothing was written yet."""
    return numbers.view(torch.int16)


def blocks_of(model):
    """The library's blocks of an attached model, to be changed."""
    return model.model.engine.step._blocks


def test_a_cache_of_a_type_that_is_not_built_stops_the_step_before_anything_is_written(tiny):
    model = sparity.attach(tiny("llama"))
    cache = cache_of(model, TOKENS[:, :5])
    blocks_of(model)[2].attention.cache.type = 1
    before = [bits(layer._buffers[0]).clone() for layer in cache.layers]
    with pytest.raises(MemoryError):
        hidden(model, TOKENS[:, 5:6], cache)
    assert all(torch.equal(old, bits(layer._buffers[0])) for old, layer in zip(before, cache.layers, strict=True))
    assert cache.get_seq_length() == 5
