"""Decoding on the fast path: what it computes, when it runs, and that generation does with it what it does without."""

import copy
import weakref

import pytest
import torch

import sparity
from families import FAST, build, tiny_configs
from quick_models import NEXT, cache_of, same
from quick_models import PROMPT as PAIR
from sparity.engine.decoding.model import not_fast
from sparity.engine.kernels import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
PROMPT = torch.arange(3, 17).reshape(2, 7)


def decoded(model, tokens, mask=None, first=4, **options):
    """Logits `[batch, tokens - first + 1, vocabulary]`: a prompt of `first` tokens, then one token after another."""
    with torch.no_grad():
        seen = None if mask is None else mask[:, :first]
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        output = model(
            tokens[:, :first],
            attention_mask=seen,
            position_ids=None if positions is None else positions[:, :first],
            use_cache=True,
        )
        found = [output.logits[:, -1]]
        for at in range(first, tokens.shape[1]):
            output = model(
                tokens[:, at : at + 1],
                attention_mask=None if mask is None else mask[:, : at + 1],
                position_ids=None if positions is None else positions[:, at : at + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
                **options,
            )
            found.append(output.logits[:, -1])
    return torch.stack(found, 1).float()


def worst(found, wanted):
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("family", sorted(FAST))
@pytest.mark.parametrize("form", ["smallest", "dense"])
def test_steps_are_as_exact_as_the_models_own(tiny, steps, family, form):
    model, tokens = tiny(family), torch.arange(60).reshape(3, 20) % 97
    exact, plain = decoded(copy.deepcopy(model).float(), tokens), decoded(model, tokens)
    sparity.attach(model, form=form)
    assert not_fast(model) is None
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


def test_parameters_may_change_their_memory_and_type(tiny, steps):
    model, tokens = sparity.attach(tiny("llama")), torch.arange(24).reshape(2, 12)
    expected = decoded(model, tokens)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()
    assert torch.equal(decoded(model, tokens), expected)
    taken = len(steps)
    model.model.norm.float()
    with torch.no_grad(), pytest.raises(RuntimeError):  # what transformers' own code says of mixed types
        model(tokens, use_cache=True)
    assert len(steps) == taken


def test_why_a_model_is_not_fast(tiny):
    for family, words in (
        ("gpt2", "GPT2Model is none of"),
        ("mixtral", "MixtralModel is none of"),
    ):
        assert words in not_fast(sparity.attach(tiny(family)))
    model = tiny("llama")
    assert not_fast(model) == "it is not attached to the engine"
    assert "layers.0.self_attn.q_proj is not multiplied by the compiled kernels" in not_fast(
        sparity.attach(model, form="csr")
    )
    for family, words in (("llama", "heads of size 8"), ("mistral", "a window of the text only")):
        assert words in not_fast(sparity.attach(build(tiny_configs()[family]).bfloat16()))
    config = tiny_configs()["llama"]
    config.hidden_act = "gelu"
    assert "its activation is gelu" in not_fast(sparity.attach(build(config).bfloat16()))


def of_every(path, value):
    """A change of an attribute of every layer."""

    def change(model):
        owner, _, name = path.rpartition(".")
        for layer in model.model.layers:
            setattr(layer.get_submodule(owner), name, value)

    return change


def exchange_layers(model):
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in (1, 0, 2))


def drop_attention(model):
    model.train()
    of_every("self_attn.attention_dropout", 0.9)(model)


def see_windows(model):
    model.config.sliding_window, model.config.layer_types = 2, ["sliding_attention"] * 3
    model.model.has_sliding_layers = True


def add_bias(model):
    for layer in model.model.layers:
        layer.mlp.up_proj.bias = torch.nn.Parameter(torch.full((layer.mlp.up_proj.out_features,), 3.0).bfloat16())


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("llama", of_every("self_attn.scaling", 2.0), None),
        ("llama", of_every("post_attention_layernorm.variance_epsilon", 5.0), None),
        ("qwen3", of_every("self_attn.k_norm.variance_epsilon", 5.0), "queries and keys are not normed alike"),
        ("llama", add_bias, None),
        ("llama", exchange_layers, "layers.0 keeps its keys and values as layer 1"),
        ("llama", drop_attention, None),
        ("qwen3", see_windows, "a window of the text only"),
    ],
)
def test_a_change_after_attaching_counts(tiny, family, change, reason):
    plain = tiny(family)
    model = sparity.attach(copy.deepcopy(plain))
    caches = {id(made): (cache_of(made, PAIR), cache_of(made, PAIR)) for made in (plain, model)}

    def step(made, which):
        torch.manual_seed(0)
        with torch.no_grad():
            return made.model(input_ids=NEXT, past_key_values=caches[id(made)][which]).last_hidden_state

    before = step(model, 0)
    change(plain)
    change(model)
    found = step(model, 1)
    assert same(found, step(plain, 1))
    assert (not_fast(model) is None) if reason is None else reason in not_fast(model)
    assert reason or not same(found, before)


def test_code_that_was_replaced_is_run(tiny, steps, monkeypatch):
    model = sparity.attach(tiny("llama"))
    cache, kind = cache_of(model, PAIR), type(model.model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: x.fill_(float("nan")))
    with torch.no_grad():
        assert model(NEXT, past_key_values=cache).logits.isnan().all()
    assert steps == []
    assert "LlamaMLP.forward was replaced by one of" in not_fast(model)


def test_a_weight_is_kept_while_the_fast_path_has_its_address(tiny):
    model, tokens = sparity.attach(tiny("llama"), form="dense"), torch.arange(24).reshape(2, 12)
    decoded(model, tokens)
    layer = model.model.layers[0].self_attn.q_proj
    read = weakref.ref(layer.prepared)
    layer.weight.data = layer.weight.data.clone()
    with torch.no_grad():
        model(tokens, use_cache=False)  # prepares the weight anew, beside the fast path
    assert read() is not None  # else another weight could come to lie there, and pass for it
    decoded(model, tokens)
    assert read() is None
