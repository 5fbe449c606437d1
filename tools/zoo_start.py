"""Beginnings that need fewer tokens: a trained Llama for another architecture, waves for learned positions."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def begin_from(model: PreTrainedModel, source: PreTrainedModel, seed: int) -> None:
    """Copy into `model` (OPT or Mixtral) what it can use of `source`, a Llama of the same width.

    An OPT takes the embeddings and the norm before the head: attention made for rotary positions would hinder it. A
    Mixtral of the same depth and heads takes all but the MLPs, and each expert gets some of their neurons (sparse
    upcycling, Komatsuzaki et al. 2023, arXiv:2212.05055).
    """
    drawn = torch.Generator().manual_seed(seed)
    model.get_input_embeddings().weight.copy_(source.get_input_embeddings().weight)
    if model.config.model_type == "opt":
        model.model.decoder.final_layer_norm.weight.copy_(source.model.norm.weight)
        return
    model.model.norm.weight.copy_(source.model.norm.weight)
    for block, old in zip(model.model.layers, source.model.layers, strict=True):
        block.self_attn.load_state_dict(old.self_attn.state_dict())
        block.input_layernorm.weight.copy_(old.input_layernorm.weight)
        block.post_attention_layernorm.weight.copy_(old.post_attention_layernorm.weight)
        experts = block.mlp.experts
        for expert, neurons in enumerate(shared_out(len(old.mlp.gate_proj.weight), experts.down_proj.shape, drawn)):
            gate_up = torch.cat([old.mlp.gate_proj.weight[neurons], old.mlp.up_proj.weight[neurons]])
            experts.gate_up_proj[expert].copy_(gate_up)
            # A token's two experts have about half of the neurons: what they give is doubled.
            experts.down_proj[expert].copy_(old.mlp.down_proj.weight[:, neurons] * 2)


def shared_out(neurons: int, down: torch.Size, drawn: torch.Generator) -> list[Tensor]:
    """For each expert the neurons that it gets: all are given before one is given again."""
    experts, _, size = down
    rounds = -(-experts * size // neurons)
    order = torch.cat([torch.randperm(neurons, generator=drawn) for _ in range(rounds)])
    return list(order[: experts * size].view(experts, size))


@torch.no_grad()
def place(model: PreTrainedModel) -> None:
    """Begin an OPT's learned positions as waves (Vaswani et al. 2017, arXiv:1706.03762, 3.5), as large as its words.

    Then one linear map leads from every position to the one before it, and heads that look there form early.
    """
    positions = model.model.decoder.embed_positions.weight  # [positions, size]
    count, size = positions.shape
    slowness = 2000.0 ** (torch.arange(size // 2) / (size // 2))
    angles = torch.arange(count)[:, None] / slowness
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    positions.copy_(waves * (model.get_input_embeddings().weight.std() / math.sqrt(0.5)))
