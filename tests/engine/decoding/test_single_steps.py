"""`generate` takes quick steps, and gives the bits that calls of the model give."""

import copy

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer

import sparity
from sparity.engine.decoding.single_steps import AHEAD, SingleSteps
from sparity.engine.kernels import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
PROMPT = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0] + [1] * 6])
OPTIONS = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


class Never(StoppingCriteria):
    """Stops nothing; but who knows what a user's code does."""

    def __call__(self, input_ids, scores, **named):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.fixture
def quick(monkeypatch):
    """A list that grows by the rows of each quick step."""
    taken, original = [], SingleSteps.__call__

    def spy(steps, embeddings):
        taken.append(len(embeddings))
        return original(steps, embeddings)

    monkeypatch.setattr(SingleSteps, "__call__", spy)
    return taken


def both(model, quick, prompt=PROMPT, **options):
    """What quick steps give, and what calls of the model give, which a user's criterion asks for."""
    named, found = {**OPTIONS, **EVERYTHING, **options}, []
    for criteria in ([], [Never()]):
        torch.manual_seed(5)
        quick.clear()
        found.append(model.generate(prompt, stopping_criteria=criteria, **copy.deepcopy(named)))
        assert bool(quick) is not bool(criteria)
    return found


def same(found, wanted):
    """Whether sequences, scores, logits and caches are equal, bit for bit."""
    caches = [[(layer.keys, layer.values) for layer in result.past_key_values.layers] for result in (found, wanted)]
    return (
        torch.equal(found.sequences, wanted.sequences)
        and all(map(torch.equal, found.scores, wanted.scores))
        and all(map(torch.equal, found.logits, wanted.logits))
        and len(found.logits) == len(wanted.logits)
        and all(torch.equal(*pair) for layers in zip(*caches, strict=True) for pair in zip(*layers, strict=True))
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": PADDED},
        {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"eos_token_id": list(range(40)), "max_new_tokens": 30},
        {"prefill_chunk_size": 3},
    ],
    ids=["greedy", "padded", "sampled", "penalties", "ends", "chunks"],
)
def test_every_bit_is_that_of_the_models_calls(tiny, quick, family, options):
    model = sparity.attach(tiny(family))
    assert same(*both(model, quick, **options))


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_packed_embeddings_and_heads(tiny, quick, values):
    model = sparity.attach(tiny("llama"), values=values, embeddings=values)
    assert same(*both(model, quick))


@pytest.mark.parametrize("kind", ["default", "dynamic", "llama3"])
def test_positions_beyond_the_tables_that_are_made_at_a_time(tiny, quick, kind):
    model = tiny("llama")
    if kind != "default":
        parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
        if kind == "llama3":
            parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        model.config.rope_parameters = parameters
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    assert same(*both(sparity.attach(model), quick, max_new_tokens=2 * AHEAD + 3, attention_mask=PADDED))


def test_a_conversation_goes_on(tiny, quick):
    model, results = sparity.attach(tiny("llama")), []
    for criteria in ([], [Never()]):
        named = {**OPTIONS, **EVERYTHING, "stopping_criteria": criteria}
        first = model.generate(PROMPT[:1], **named)
        longer = torch.cat((first.sequences, torch.tensor([[9, 8, 7]])), 1)
        results.append(model.generate(longer, past_key_values=first.past_key_values, **named))
    assert same(*results)
    assert len(quick) == 2 * 8


def test_a_prompt_of_embeddings(tiny, quick):
    model = sparity.attach(tiny("llama"))
    embedded = model.get_input_embeddings()(PROMPT).detach()
    assert same(*both(model, quick, prompt=None, inputs_embeds=embedded))


def test_streams_get_every_token(tiny, quick, capsys):
    class Words:
        def decode(self, ids, **_):
            return "".join(f"{int(token)} " for token in ids)

    model = sparity.attach(tiny("llama"))
    found = model.generate(PROMPT[:1], streamer=TextStreamer(Words()), **OPTIONS)
    assert capsys.readouterr().out.split() == [str(int(token)) for token in found[0]]
    assert len(quick) == 8


@pytest.mark.parametrize("place", ["model", "model.model", "model.model.embed_tokens", "model.lm_head"])
def test_hooks_are_called_for_every_token(tiny, quick, place):
    model, seen = sparity.attach(tiny("llama")), []
    hook = eval(place).register_forward_hook(lambda *_: seen.append(1))
    model.generate(PROMPT, **OPTIONS)
    assert (len(seen), quick) == (9, [])
    hook.remove()
    model.generate(PROMPT, **OPTIONS)
    assert (len(seen), len(quick)) == (9, 8)


def test_what_a_users_code_changes_between_tokens_counts(tiny, quick):
    model = sparity.attach(tiny("llama"))

    class Change(BaseStreamer):
        def put(self, value):
            with torch.no_grad():
                model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 1.1)

        def end(self):
            pass

    found = model.generate(PROMPT[:1], streamer=Change(), **OPTIONS, **EVERYTHING)
    assert quick == []
    still = model.generate(PROMPT[:1], **OPTIONS, **EVERYTHING)
    changed = [not torch.equal(*pair) for pair in zip(found.logits, still.logits, strict=True)]
    assert all(changed)
    assert len(quick) == 8


def test_what_was_changed_before_a_call_counts(tiny, quick):
    model = sparity.attach(tiny("llama"))
    before = model.generate(PROMPT, **OPTIONS, **EVERYTHING)
    model.model.layers[0].mlp.forward = torch.zeros_like
    quick.clear()
    after = model.generate(PROMPT, **OPTIONS, **EVERYTHING)
    assert quick == []
    assert not torch.equal(before.logits[1], after.logits[1])


@pytest.mark.parametrize(
    "options",
    [
        {"output_attentions": True, "return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 2},
        {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(97))},
    ],
    ids=["attentions", "uncached", "static", "beams", "prefixes"],
)
def test_what_is_asked_for_beyond_takes_the_models_own_way(tiny, quick, options):
    model = sparity.attach(tiny("llama"))
    if "output_attentions" in options:
        model.set_attn_implementation("eager")
    found = model.generate(PROMPT, **{**OPTIONS, **options})
    sequences = found if isinstance(found, torch.Tensor) else found.sequences
    assert sequences.shape == (3, 16)
    assert quick == []


@pytest.mark.parametrize(
    ("method", "options"),
    [("teal", {"first": 0}), ("teal", {}), ("cats", {"sites": "gate_output"}), ("thresholds", {"centre": "mean"})],
)
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_skipped_channels(tiny, quick, method, options, mask):
    model, ids = tiny("llama"), torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(3))
    with sparity.with_activations(model, ids, method=method, sparsity=0.5, **options), sparity.attached(model):
        assert same(*both(model, quick, attention_mask=mask))
        dense = model.generate(PROMPT, **OPTIONS, **EVERYTHING)
    with sparity.attached(model):
        other = model.generate(PROMPT, **OPTIONS, **EVERYTHING)
    assert not torch.equal(dense.logits[1], other.logits[1])


def test_where_the_first_tokens_are_dense_steps_are_not_quick(tiny, quick):
    model, ids = tiny("llama"), torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(3))
    with sparity.with_activations(model, ids, method="teal", sparsity=0.5, first=5), sparity.attached(model):
        model.generate(PROMPT, attention_mask=PADDED, **OPTIONS)
        assert quick == []
        model.generate(PROMPT, **OPTIONS)
        assert quick == [3] * 8


def test_the_class_is_the_models_own_again(tiny):
    model = tiny("llama")
    kind, base = type(model), type(model.model)
    sparity.attach(model, form="dense")
    assert type(model) is not kind
    assert (type(model).__name__, type(model).__module__) == (kind.__name__, kind.__module__)
    assert isinstance(model, kind)
    with sparity.attached(tiny("llama")) as other:
        assert type(other) is not kind
    assert type(other) is kind
    assert type(other.model) is base


def test_a_copy_takes_quick_steps_too(tiny, quick):
    model = sparity.attach(tiny("llama"))
    found = copy.deepcopy(model).generate(PROMPT, **OPTIONS)
    assert len(quick) == 8
    assert torch.equal(found, model.generate(PROMPT, **OPTIONS))


def test_an_interrupted_call_leaves_a_cache_to_go_on_with(tiny, quick, monkeypatch):
    model, cache = sparity.attach(tiny("llama")), DynamicCache()
    wanted = model.generate(PROMPT[:1], **OPTIONS)

    class Stop(TextStreamer):
        def put(self, value):
            if cache.get_seq_length() == 10:
                raise KeyboardInterrupt

    Stop.__module__ = "transformers.streamers"
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT[:1], past_key_values=cache, streamer=Stop(None), **OPTIONS)
    assert cache.get_seq_length() == 10
    assert [layer.keys.shape[2] for layer in cache.layers] == [10] * 3
    rest = {**OPTIONS, "max_new_tokens": 5}
    assert torch.equal(model.generate(wanted[:, :11], past_key_values=cache, **rest), wanted)
