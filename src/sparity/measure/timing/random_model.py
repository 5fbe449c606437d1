"""Speed of a random Llama that leaves the processor's caches, where a small model cannot show what zeros gain."""

import copy
from typing import Any

import torch

from sparity.engine.attach import attach
from sparity.engine.kernels import native
from sparity.measure.data.report import LargerModel
from sparity.measure.show import numbers
from sparity.measure.timing.contenders import held_bytes
from sparity.measure.timing.speed import compare_speed
from sparity.memory import available_memory
from sparity.models import transformers as hf

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
MEMORY = 4_000_000_000  # bytes that must be available: two models of 0.7 GB and what packing needs
PROMPT, TOKENS, ROUNDS = 32, 16, 4


def time_larger(shape: dict[str, Any] = SHAPE) -> LargerModel:
    """Build a Llama of this shape with random bfloat16 weights, half of those in its blocks zero, and time it.

    It decodes packed, dense on the engine and dense in transformers, in turns. Where the kernels or the memory are
    missing, the result says so instead.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(**shape)
    model: Any = hf.empty_model(config, torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    available = available_memory()
    lacking = None
    if reason := native.unavailable():
        lacking = f"no compiled kernels: {reason}"
    elif available is not None and available < MEMORY:
        lacking = f"{numbers.size(available)} of memory is available, {numbers.size(MEMORY)} is needed"
    if lacking:
        return LargerModel(parameters, 0.0, 0, 0, None, lacking)
    sparsity = _fill(model, torch.Generator().manual_seed(0))
    packed = attach(copy.deepcopy(model))
    prompt = torch.arange(PROMPT) % config.vocab_size
    speed = compare_speed(model, packed, prompt, PROMPT, TOKENS, ROUNDS)
    return LargerModel(parameters, sparsity, held_bytes(model), held_bytes(packed), speed)


def _fill(model: Any, generator: torch.Generator) -> float:
    """Give a model without memory its weights; the share of zeros in the matrices of its blocks."""
    weights = {name: torch.empty_like(held, device="cpu") for name, held in model.named_parameters()}
    zeros = count = 0
    for name, weight in weights.items():
        if weight.dim() == 1:  # of a norm
            weight.fill_(1)
            continue
        weight.uniform_(-0.05, 0.05, generator=generator)
        if name.startswith(f"{model.base_model_prefix}.layers."):
            weight.masked_fill_(torch.empty(weight.shape, dtype=torch.bool).random_(generator=generator), 0)
            zeros += int((weight == 0).sum())
            count += weight.numel()
    model.load_state_dict(weights, assign=True)
    return zeros / count
