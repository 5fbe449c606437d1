"""Decoding on the fast path: what it computes, when it runs, and that generation does with it what it does without."""

import copy

import pytest
import torch

import sparity
from families import FAST, build, tiny_configs
from quick_models import NEXT, cache_of, decoded
from sparity.engine.decoding.model import declines
from sparity.engine.kernels import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
PROMPT = torch.arange(3, 17).reshape(2, 7)


def worst(found, wanted):
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("family", sorted(FAST))
@pytest.mark.parametrize("form", ["smallest", "dense"])
def test_steps_are_as_exact_as_the_models_own(tiny, steps, family, form):
    model, tokens = tiny(family), torch.arange(60).reshape(3, 20) % 97
    exact, plain = decoded(copy.deepcopy(model).float(), tokens), decoded(model, tokens)
    sparity.attach(model, form=form)
    assert declines(model) is None
    assert worst(decoded(model, tokens), exact) <= 1.5 * worst(plain, exact) + 1e-3
    assert steps == [3] * 16


@pytest.mark.parametrize("batch", [1, 16, 17, 32])
def test_batches(tiny, steps, batch):
    model, tokens = sparity.attach(tiny("llama")), torch.arange(batch * 9).reshape(batch, 9) % 97
    together = decoded(model, tokens)
    for row in {0, batch - 1}:
        assert worst(together[row], decoded(model, tokens[row : row + 1])[0]) < 0.05 * float(together.abs().max())
    assert steps[:5] == [batch] * 5


def test_many_rows_take_the_models_own_code(tiny, steps):
    model = sparity.attach(tiny("llama"))
    assert decoded(model, torch.arange(33 * 5).reshape(33, 5) % 97).shape == (33, 2, 97)
    assert steps == []


def test_left_padding_changes_nothing(tiny, steps):
    model, tokens = sparity.attach(tiny("qwen3")), torch.arange(5, 17).reshape(1, 12)
    alone = decoded(model, tokens, first=5)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), tokens), 1).repeat(2, 1)
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    steps.clear()
    both = decoded(model, padded, mask, first=9)
    assert steps == [2] * 7
    assert worst(both[0], alone[0]) < 0.02 * float(alone.abs().max())
    assert worst(both[1], alone[0]) > 0.1 * float(alone.abs().max())  # there, the padding was text


def test_the_number_of_threads_changes_no_bit(tiny):
    model, tokens = sparity.attach(tiny("llama")), torch.arange(40).reshape(2, 20)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(decoded(model, tokens))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def best_up_to_rounding(model, sequences, prompt):
    """Whether every new token is the best choice, or within rounding of it, by one pass without a cache."""
    with torch.no_grad():
        scores = model(sequences, use_cache=False).logits[:, prompt - 1 : -1].float()
    chosen = scores.gather(-1, sequences[:, prompt:, None])[..., 0]
    return bool((chosen >= scores.amax(-1) - 0.03 * scores.abs().amax()).all())


GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, "min_new_tokens": 12}


@pytest.mark.parametrize(
    ("options", "fast"),
    [
        ({}, True),
        ({"return_dict_in_generate": True, "output_scores": True, "output_logits": True}, True),
        ({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "renormalize_logits": True}, True),
        ({"prompt_lookup_num_tokens": 3}, None),
        ({"use_cache": False}, False),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, False),
        ({"output_attentions": True, "return_dict_in_generate": True}, False),
        ({"cache_implementation": "static"}, False),
    ],
)
def test_greedy_generation_with_its_options(tiny, steps, options, fast):
    model = sparity.attach(tiny("llama"))
    if "output_attentions" in options:
        model.set_attn_implementation("eager")
    prompt = PROMPT[:1] if "prompt_lookup_num_tokens" in options else PROMPT
    found = model.generate(prompt, **GREEDY, **options)
    sequences = found if isinstance(found, torch.Tensor) else found.sequences
    assert sequences.shape == (len(prompt), 19)
    assert best_up_to_rounding(model, sequences, 7)
    if fast is not None:
        assert (len(steps) == 11) if fast else steps == []
    if "output_hidden_states" in options:
        assert len(found.hidden_states[3]) == 4  # the embedding and three blocks
    if "output_attentions" in options:
        assert found.attentions[3][0].shape == (2, 4, 1, 10)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True, "temperature": 0.8},
    ],
)
def test_beams(tiny, steps, options):
    model = sparity.attach(tiny("llama"))
    torch.manual_seed(0)
    named = {**GREEDY, **options, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    found = model.generate(PROMPT, **named)
    assert steps[0] == len(PROMPT) * options["num_beams"]
    with torch.no_grad():
        scores = model(found.sequences, use_cache=False).logits[:, 6:-1].float().log_softmax(-1)
    if not options.get("do_sample"):
        summed = scores.gather(-1, found.sequences[:, 7:, None]).sum((1, 2))
        torch.testing.assert_close(found.sequences_scores, summed, rtol=0.03, atol=0.3)


def test_sampling_repeats_with_its_seed(tiny, steps):
    model = sparity.attach(tiny("llama"))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        named = {**GREEDY, "do_sample": True, "top_k": 20, "top_p": 0.9, "num_return_sequences": 3}
        found.append(model.generate(PROMPT, **named))
    assert found[0].shape == (6, 19)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert steps == [6] * 33


def test_an_assistant_drafts(tiny):
    model, assistant = sparity.attach(tiny("llama")), sparity.attach(tiny("llama"))
    found = model.generate(PROMPT[:1], assistant_model=assistant, **GREEDY)
    assert best_up_to_rounding(model, found, 7)


def test_conversations_go_on_from_their_cache(tiny, steps):
    model = sparity.attach(tiny("llama"))
    first = model.generate(PROMPT[:1], **GREEDY, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, torch.tensor([[9, 8, 7]])), 1)
    again = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert best_up_to_rounding(model, again, longer.shape[1])
    assert steps == [1] * 22


def test_hooks_are_called(tiny, steps):
    model, seen = sparity.attach(tiny("llama")), []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    model.generate(PROMPT, **GREEDY)
    assert (len(seen), steps) == (12, [])
    handle.remove()
    model.generate(PROMPT, **GREEDY)
    assert (len(seen), len(steps)) == (12, 11)


def test_why_a_model_is_not_fast(tiny):
    for family, words in (
        ("gpt2", "GPT2Model is none of"),
        ("mixtral", "MixtralModel is none of"),
    ):
        assert words in declines(sparity.attach(tiny(family)))
    model = tiny("llama")
    assert declines(model) == "it is not attached to the engine"
    assert "layers.0.self_attn.q_proj is not multiplied by the compiled kernels" in declines(
        sparity.attach(model, form="csr")
    )
    for family, words in (("llama", "heads of size 8"), ("mistral", "a window of the text only")):
        assert words in declines(sparity.attach(build(tiny_configs()[family]).bfloat16()))
    config = tiny_configs()["llama"]
    config.hidden_act = "gelu"
    assert "its activation is gelu" in declines(sparity.attach(build(config).bfloat16()))


def test_a_cache_may_be_looked_at_between_steps(tiny, steps):
    """Keys and values are made when somebody asks; whether anybody does changes nothing, and nothing is moved."""
    model = sparity.attach(tiny("llama"))
    found = []
    for looks in (False, True):
        cache, tokens, places = cache_of(model, PROMPT), NEXT, set()
        with torch.no_grad():
            for _ in range(6):
                if looks:
                    assert cache.layers[1].keys.shape[2] == cache.get_seq_length()
                    places |= {layer.values.data_ptr() for layer in cache.layers}
                tokens = model(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
        assert not looks or len(places) <= 2 * len(cache.layers)  # before the first step, and since
        found.append([tokens, *(part for layer in cache.layers for part in (layer.keys, layer.values))])
    assert all(map(torch.equal, *found))
    assert len(steps) == 12
