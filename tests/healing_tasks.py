"""A tiny sparse model beside the dense one, small options of every method of healing, and recipes that heal."""

import copy
import json

import torch
from workspaces import Notes

from families import build, tiny_configs
from sparity import registry
from sparity.healing.heal.methods.base import Task
from sparity.models import Decoder
from sparity.models.attached_runtime import input_sites
from sparity.recipe import Recipe
from sparity.static.prune.patterns.base import build_pattern

PRUNE = {"prune": {"score": "magnitude", "pattern": "2:4"}}
IDS = torch.randint(2, 97, (6, 24), generator=torch.Generator().manual_seed(0))
METHODS = {
    "least_squares": {},
    "eora": {"rank": 4},
    "slim": {"rank": 0.2},
    "reconstruction": {"steps": 4, "rate": 3e-3},
    "lora": {"steps": 4, "rate": 1e-2, "rank": 2},
    "distillation": {"steps": 4, "rate": 3e-3, "top": 16},
    "finetune": {"steps": 4, "rate": 3e-3},
    "dynamic_batches": {"steps": 4, "rate": 3e-3, "domains": ["even", "odd"], "every": 2},
}


def drawn(*shape, seed=0):
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run_method(name, task, **options):
    """A task after a method with its small options and these."""
    return registry.build("heal.method", {name: {**METHODS[name], **options}}).heal(task)


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


def recipe_of(model, tokens, *stages, **sections):
    return Recipe.read(
        {
            "model": str(model),
            "calibration": {"tokens": tokens, "batch": 4},
            "stages": list(stages),
            "measure": {"perplexity": [], "speed": None},
            **sections,
        }
    )


def heal(name, **stage):
    return {"heal": {"method": {name: METHODS[name]}, **stage}}


def zeros(folder):
    decoder, found = Decoder.open(folder), {}
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            found |= {projection.name: projection.weight == 0 for projection in block.projections}
    return found


def decision(result):
    return json.loads((result.path / "sparity.json").read_text())["stages"][-1]["decision"]
