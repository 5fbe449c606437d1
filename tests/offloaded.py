"""Models whose neurons, or experts, are on disk, for tests."""

from contextlib import contextmanager

import numpy as np
import torch

import sparity
from sparity.dynamic.offload.loading import load_offloaded

CALIBRATION = torch.arange(3 * 40).view(3, 40) * 37 % 8192


def with_stage(source, folder, dtype="float32", **options):
    """The model with an `activations` stage, in a folder."""
    np.save(tokens := folder.with_suffix(".npy"), CALIBRATION.numpy())
    recipe = {
        "model": source, "dtype": dtype, "calibration": {"tokens": str(tokens)},
        "stages": [{"activations": options}], "measure": {"perplexity": [], "speed": None},
    }  # fmt: skip
    return sparity.run(recipe, output=folder).path


@contextmanager
def opened(folder, memory, **options):
    """A model, closed afterwards."""
    model = load_offloaded(folder, memory, **options)
    try:
        yield model
    finally:
        model.sparity_offload.close()
