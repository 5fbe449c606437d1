"""Tiny models, and a few steps of sparse training of them."""

import copy

import torch
from workspaces import Notes

from families import build, tiny_configs
from sparity.models.attached_runtime import input_sites
from sparity.training.sparse_training.stage import SparseTraining

IDS = torch.randint(2, 97, (6, 24), generator=torch.Generator().manual_seed(0))


def tiny(family="llama", blocks=1):
    config = copy.deepcopy(tiny_configs()[family])
    config.num_hidden_layers = blocks
    return build(config)


def every(model):
    return {projection.name: projection for site in input_sites(model) for projection in site.projections}


def train(model, method, masks=None, work=None, **options):
    options = {"steps": 3, "rate": 3e-3, "batch": 2, **options}
    return SparseTraining(method=method, **options).train(model, masks or {}, IDS, work or Notes())
