"""A whole model in int4: prompts are those of the rounded weights, and decoding is close to them."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparity
from sparity.engine.decoding.model import has_fast_path
from sparity.engine.kernels import native
from sparity.formats.encodings.int4 import Int4

NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}")


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16().eval()


def rounded(model, encoding):
    """A copy whose blocks have the weights that the encoding gives back."""
    found = copy.deepcopy(model)
    for name, module in found.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert "proj" in name
            module.weight.data = encoding.decode(*encoding.encode(module.weight.data), torch.bfloat16)
    return found


@NATIVE
@pytest.mark.parametrize("form", ["dense", "bitmask"])
@pytest.mark.parametrize("options", [{}, {"group": 64, "symmetric": False}])
def test_prompts_and_steps_of_an_attached_model(model, form, options):
    twin = rounded(model, Int4(**options))
    sparity.attach(model, form, {"int4": options})
    assert has_fast_path(model)
    tokens = torch.arange(1, 41)[None] * 7 % 97
    with torch.no_grad():
        wanted = twin(tokens).logits.float()
        prompt = model(tokens).logits.float()
        start = model(tokens[:, :36], use_cache=True)
        steps = [start.logits[:, -1]]
        for place in range(36, 40):
            steps.append(model(tokens[:, place : place + 1], past_key_values=start.past_key_values).logits[:, -1])
    scale = float(wanted.std())
    assert float((prompt - wanted).abs().max()) < 0.05 * scale  # rounding of bfloat16 alone
    assert float((torch.stack(steps, 1).float() - wanted[:, 35:]).abs().max()) < 0.15 * scale  # and of the inputs
    text = model.generate(tokens[:, :5], min_new_tokens=6, max_new_tokens=6, do_sample=False)
    again = model.generate(tokens[:, :5], min_new_tokens=6, max_new_tokens=6, do_sample=False)
    assert torch.equal(text, again)
