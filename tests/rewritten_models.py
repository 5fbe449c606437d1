"""Runs of stages that rewrite a model and leave its logits, and its matrices before and after."""

import torch

from sparity.models import Decoder
from sparity.recipe import Recipe

TOKENS = torch.arange(40)[None] % 97


def recipe(token_files, folder, *stages, **measure):
    """A recipe of these stages, which measures what it is asked to."""
    return Recipe.read(
        {
            "model": str(folder),
            "calibration": {"tokens": token_files["calibration"], "batch": 3},
            "stages": list(stages),
            "measure": {"speed": None, **measure},
        }
    )


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def matrices(folder):
    """(block, role, expert) -> the weight in float32."""
    decoder = Decoder.open(folder)
    found = {}
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            found.update({(index, p.role, p.expert): p.weight.float().clone() for p in block.projections})
    return found
