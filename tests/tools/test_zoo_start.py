"""Beginning from a trained Llama."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import zoo_start
from zoo_plans import llama, mixtral, opt


def test_neurons_are_all_given_before_one_is_given_again():
    parts = zoo_start.shared_out(12, torch.Size([4, 5, 6]), torch.Generator().manual_seed(0))
    assert [len(part) for part in parts] == [6, 6, 6, 6]
    assert sorted(torch.cat(parts[:2]).tolist()) == list(range(12))
    assert sorted(torch.cat(parts[2:]).tolist()) == list(range(12))


def test_an_opt_takes_the_embeddings_and_the_last_norm():
    source = AutoModelForCausalLM.from_config(llama(64, 1, 32))
    torch.nn.init.normal_(source.model.norm.weight)
    model = AutoModelForCausalLM.from_config(opt(64, 2, 16))
    zoo_start.begin_from(model, source, seed=0)
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert torch.equal(model.model.decoder.final_layer_norm.weight, source.model.norm.weight)


def test_a_mixtral_whose_experts_have_all_neurons_is_the_llama():
    source = AutoModelForCausalLM.from_config(llama(64, 2, 32)).eval()
    model = AutoModelForCausalLM.from_config(mixtral(64, 2, 32)).eval()
    zoo_start.begin_from(model, source, seed=0)
    with torch.no_grad():
        for block in model.model.layers:  # doubled for the half that two small experts have: not so here
            block.mlp.experts.down_proj.div_(2)
    ids = torch.randint(8192, (1, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, atol=1e-5, rtol=1e-4)


def test_positions_begin_as_waves_of_which_each_is_one_map_of_the_one_before():
    model = AutoModelForCausalLM.from_config(opt(64, 1, 100))
    words = model.get_input_embeddings().weight
    torch.nn.init.normal_(words, std=0.3)
    zoo_start.place(model)
    positions = model.model.decoder.embed_positions.weight
    assert positions.square().mean().sqrt().item() == pytest.approx(0.3, abs=0.005)
    steps = torch.linalg.lstsq(positions[1:].double(), positions[:-1].double()).solution  # [size, size]
    torch.testing.assert_close(positions[1:].double() @ steps, positions[:-1].double(), atol=1e-5, rtol=0)
