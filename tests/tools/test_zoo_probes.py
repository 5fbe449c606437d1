"""What is measured of a model, on models whose answers are known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import zoo_probes
from zoo_plans import mixtral, opt


class Echo:
    """Says that a token is followed by what followed it last time, and else by token 1."""

    device = torch.device("cpu")
    config = SimpleNamespace(vocab_size=8192)

    def __call__(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 8192)
        for row, ids in enumerate(input_ids.tolist()):
            seen = {}
            for place, token in enumerate(ids):
                if place:
                    seen[ids[place - 1]] = token
                logits[row, place, seen.get(token, 1)] = 9.0
        return SimpleNamespace(logits=logits)


class Dull(Echo):
    """Never saw a token before, so that it always says token 1."""

    def __call__(self, input_ids):
        return super().__call__(torch.arange(input_ids.numel()).view_as(input_ids))


def test_a_model_that_copies_copies_all_and_one_that_knows_nothing_none():
    assert zoo_probes.copied(Echo(), 8, 20) > 0.99  # but for a token that occurs twice in its segment
    assert zoo_probes.copied(Dull(), 8, 20) == 0


def test_perplexity_is_of_whole_windows():
    class Even(Echo):
        def __call__(self, input_ids):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    tokens = np.arange(45, dtype=np.uint16)
    assert zoo_probes.perplexity(Even(), tokens, 10, 9) == pytest.approx(50)


def test_unigram_perplexity_by_hand():
    train, held_out = np.array([0, 0, 1]), np.array([0, 2])  # counts and one: 3, 2, 1 of 6
    assert zoo_probes.unigram_perplexity(train, held_out, 3) == pytest.approx(
        math.exp(-(math.log(3 / 6) + math.log(1 / 6)) / 2)
    )


def test_zeros_before_fc2_are_counted_per_layer():
    model = AutoModelForCausalLM.from_config(opt(32, 2, 16))
    layers = model.model.decoder.layers
    nn.init.zeros_(layers[0].fc1.weight)
    nn.init.constant_(layers[0].fc1.bias, 1.0)
    nn.init.zeros_(layers[1].fc1.weight)
    with torch.no_grad():
        layers[1].fc1.bias.copy_(torch.tensor([1.0, -1.0, -1.0, -1.0]).repeat(32))
    assert zoo_probes.zeros_before_fc2(model, torch.arange(8)[None]) == [0.0, 0.75]
    assert not layers[0].fc2._forward_pre_hooks


def test_expert_load_is_each_experts_share_of_the_choices():
    model = AutoModelForCausalLM.from_config(mixtral(32, 1, 16))
    router = next(module for name, module in model.named_modules() if name.endswith(".gate"))
    nn.init.zeros_(router.weight)
    (even,) = zoo_probes.expert_load(model, torch.arange(8)[None])
    assert sorted(even)[-2:] == [0.5, 0.5]  # all scores are equal, so every token takes the same two
    assert sum(even) == pytest.approx(1)
