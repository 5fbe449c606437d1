"""Tiny models for methods of structured pruning, with text, and the same models with their parts in another order."""

import copy

import torch

from families import build, tiny_configs

TOKENS = torch.randint(0, 97, (3, 16), generator=torch.Generator().manual_seed(5))
OPTIONS = {
    "laco": {"merge": 2, "threshold": -1.0},
    "flap": {"structure": "UL-UM", "bias": False},
    "llm_surgeon": {"share": "block", "shots": 2},
    "sheared": {"steps": 3, "batch": 2},
    "compresso": {"share": "block", "steps": 3, "batch": 2},
    "bonsai": {"masks": 8, "step": 0.25},
    "llm_pruner": {"keep_first": 0, "keep_last": 0},
    "lora_prune": {"keep_first": 0, "keep_last": 0, "steps": 4, "every": 1},
}
OF_EXPERTS = ("frequency", "reap", "naee", "ream")


def model_for(method):
    """A random model that a method works on; its norms' weights are not all one."""
    config = copy.deepcopy(tiny_configs()["mixtral" if method in OF_EXPERTS else "llama"])
    config.num_hidden_layers = 4
    return varied(build(config, seed=3))


def varied(model):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def with_channels_in_order(model, order):
    """The same model with the MLP channels of every block in another order."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        mlp = layer.mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.data = linear.weight.data[order]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, order]
    return model


def with_groups_in_order(model, order):
    """The same model with the key-value heads of every block, and their query heads, in another order."""
    model = copy.deepcopy(model)
    width, groups = 8, len(order)
    for layer in model.model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            rows = linear.weight.data.view(groups, -1, linear.weight.shape[1])
            linear.weight.data = rows[order].flatten(0, 1).contiguous()
        columns = attention.o_proj.weight.data.view(32, groups, -1)
        attention.o_proj.weight.data = columns[:, order].flatten(1).contiguous()
    assert width * 4 == 32
    return model


def with_experts_in_order(model, order):
    """The same model with the experts of every block, and the router's rows, in another order."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data[order]
        for name in ("gate_up_proj", "down_proj"):
            parameter = layer.mlp.experts.get_parameter(name)
            parameter.data = parameter.data[order]
    return model


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def check_types_and_gradients_stay(model, restructure):
    """What is restructured has the dtype of the model, and is frozen where the model is."""
    half = copy.deepcopy(model).bfloat16().requires_grad_(True)
    half.model.embed_tokens.weight.requires_grad_(False)
    smaller = restructure(half)
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16}
    frozen = [name for name, parameter in smaller.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
