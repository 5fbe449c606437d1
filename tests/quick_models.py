"""Tiny random models in bfloat16 with zeros in their layers, some of them known to the fast path."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache

import sparity
from families import FAST, build, tiny_configs
from sparity.engine.decoding import model as decoding
from sparity.engine.decoding.single_steps import SingleSteps
from sparity.errors import InvalidInput

PROMPT = torch.arange(10).reshape(2, 5)
ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, InvalidInput)
NEXT = torch.tensor([[7], [8]])


@pytest.fixture(scope="session")
def tiny():
    """A function that gives a family's model in bfloat16, half of every layer's weights +0."""
    made = {}

    def make(family):
        if family not in made:
            config = tiny_configs()[family]
            for name, value in FAST.get(family, {}).items():
                setattr(config, name, value)
            if "sliding_window" in FAST.get(family, {}):
                config.layer_types = None
            model = build(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim > 1 and ("layers" in name or ".h." in name):
                        parameter[torch.rand(parameter.shape) < 0.5] = 0
                    elif parameter.ndim == 1 and "norm" in name:
                        parameter.uniform_(0.5, 1.5)
            for parameter in model.parameters():  # and no buffer: rotary tables are float32 in a model that is loaded
                parameter.data = parameter.data.bfloat16()
            made[family] = model
        return copy.deepcopy(made[family])

    return make


def spy_on_fast_path(monkeypatch, note):
    """Call `note(rows, new tokens of each)` at each call that the fast path takes."""
    original = decoding._decode

    def spy(*arguments, **named):
        hidden = original(*arguments, **named)
        if isinstance(hidden, torch.Tensor):
            note(*hidden.shape[:2])
        return hidden

    monkeypatch.setattr(decoding, "_decode", spy)
    single = SingleSteps.__call__

    def spy_on_single(taker, embeddings):
        note(len(embeddings), 1)
        return single(taker, embeddings)

    monkeypatch.setattr(SingleSteps, "__call__", spy_on_single)


@pytest.fixture
def calls(monkeypatch):
    """A list that grows by (rows, new tokens of each) at each call on the fast path."""
    taken = []
    spy_on_fast_path(monkeypatch, lambda rows, fresh: taken.append((rows, fresh)))
    return taken


@pytest.fixture
def steps(monkeypatch):
    """A list that grows by the batch size at each step of one token on the fast path; short prompts do not count."""
    taken = []
    spy_on_fast_path(monkeypatch, lambda rows, fresh: taken.append(rows) if fresh == 1 else None)
    return taken


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


def cache_of(model, tokens):
    """A cache of the model's after a prompt `tokens` [batch, tokens]."""
    with torch.no_grad():
        return model.model(input_ids=tokens, past_key_values=DynamicCache(config=model.config)).past_key_values


@pytest.fixture
def both(tiny):
    """One model on the engine, its layers dense, and the same in transformers alone."""
    model = tiny("llama")
    return sparity.attach(copy.deepcopy(model), form="dense"), model


def outcome(model, inputs):
    """What a call gives: hidden states, or the kind of error."""
    with torch.no_grad():
        try:
            found = model.model(**{"past_key_values": cache_of(model, PROMPT), "input_ids": NEXT, **inputs})
        except ERRORS as error:
            return type(error)
    return found[0] if isinstance(found, tuple) else found.last_hidden_state


def same(found, wanted):
    """Whether two outcomes agree, up to rounding; a clear refusal stands for any error."""
    if isinstance(wanted, type):
        return found in (wanted, InvalidInput)
    return found.shape == wanted.shape and torch.allclose(found.float(), wanted.float(), rtol=0.05, atol=0.05)
