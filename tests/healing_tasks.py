"""A tiny sparse model beside the dense one that it was made of, and small options of every method of healing."""

import copy

import torch
from workspaces import Notes

from families import build, tiny_configs
from sparity.healing.heal.methods.base import Task
from sparity.models.attached_runtime import input_sites
from sparity.static.prune.patterns.base import build_pattern

IDS = torch.randint(2, 97, (6, 24), generator=torch.Generator().manual_seed(0))
METHODS = {
    "least_squares": {},
    "eora": {"rank": 4},
    "reconstruction": {"steps": 4, "rate": 3e-3},
    "lora": {"steps": 4, "rate": 1e-2, "rank": 2},
    "distillation": {"steps": 4, "rate": 3e-3, "top": 16},
    "finetune": {"steps": 4, "rate": 3e-3},
}


def tiny(family="llama", dtype=torch.float32, blocks=3):
    """A random model whose projections are strong enough that zeros matter."""
    config = copy.deepcopy(tiny_configs()[family])
    config.num_hidden_layers = blocks
    model = build(config).to(dtype).requires_grad_(False)
    with torch.no_grad():
        for site in input_sites(model):
            for projection in site.projections:
                projection.weight.mul_(4)
    return model


def sparse_of(dense, pattern="unstructured"):
    """A copy with zeros by magnitude, and its masks."""
    model, masks, built = copy.deepcopy(dense), {}, build_pattern(pattern)
    for site in input_sites(model):
        for projection in site.projections:
            sparsity = 0.5 if built.sparsity is None else built.sparsity
            masks[projection.name] = built.keep(projection.weight.abs().float(), sparsity, "layer")
            projection.weight.mul_(masks[projection.name])
    return model, masks


def task_of(dense, model, masks, folder, work=None, tokens=IDS):
    """What a method is given, with the dense model of its own."""
    blocks = range(len(masks) and model.config.num_hidden_layers)
    return Task(model, masks, tokens, blocks, work or Notes(folder=folder), lambda: copy.deepcopy(dense))
