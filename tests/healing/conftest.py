"""A tiny model and token ids, saved."""

import numpy as np
import pytest
import torch
from healing_tasks import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model whose zeros matter, saved."""
    path = tmp_path_factory.mktemp("dense") / "model"
    tiny(dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "calibration.npy"
    np.save(path, np.random.default_rng(3).integers(0, 97, (16, 24)))
    return str(path)
