"""Tiny random models in bfloat16 with zeros in their layers, some of them known to the fast path."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache

from families import FAST, build, tiny_configs
from sparity.engine.decoding import model as decoding


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


@pytest.fixture
def steps(monkeypatch):
    """A list that grows by the batch size at each decoding step on the fast path."""
    taken, original = [], decoding._decode

    def spy(*arguments, **named):
        hidden = original(*arguments, **named)
        if hidden is not None:
            taken.append(len(hidden))
        return hidden

    monkeypatch.setattr(decoding, "_decode", spy)
    return taken


def cache_of(model, tokens):
    """A cache of the model's after a prompt `tokens` [batch, tokens]."""
    with torch.no_grad():
        return model.model(input_ids=tokens, past_key_values=DynamicCache(config=model.config)).past_key_values
