"""A small recipe, a model folder to damage, and what every refusal has in common."""

import re
import shutil

import pytest
import torch

import sparity
from families import build, tiny_configs
from interruptions import Killed
from quick_models import both, calls, steps, tiny
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.run_folder import RunFolder

__all__ = ["both", "calls", "steps", "tiny"]


@pytest.fixture
def recipe(tiny_llama_folder, token_files):
    """A function that builds a recipe which works, with some sections replaced."""

    def build(prune=None, **sections):
        return {
            "model": str(tiny_llama_folder),
            "calibration": {"tokens": token_files["calibration"], "batch": 3},
            "stages": [{"prune": {} if prune is None else prune}],
            "measure": {"speed": None},
            **sections,
        }

    return build


@pytest.fixture
def model_copy(tiny_llama_folder, tmp_path):
    """A copy of the tiny Llama's folder, to be damaged."""
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


@pytest.fixture
def refused(tmp_path):
    """A function that runs a recipe which must be refused before anything is written."""

    def run(recipe, error, *parts, **arguments):
        with pytest.raises(sparity.SparityError) as caught:
            sparity.run(recipe, output=tmp_path / "out", device="cpu", **arguments)
        message = str(caught.value)
        assert type(caught.value) is error, message
        for part in parts:
            assert re.search(part, message), f"{part!r} is not in: {message}"
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
        return message

    return run


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A tiny Llama in bfloat16, 70 % of the weights in its projections zero, saved as it is."""
    model = build(tiny_configs()["llama"]).bfloat16()
    model.config.dtype = torch.bfloat16
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "proj" in name:
                values[torch.rand(values.shape) < 0.7] = 0
    folder = tmp_path_factory.mktemp("plain") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sound(plain, tmp_path_factory):
    """The same, packed."""
    folder = tmp_path_factory.mktemp("sound") / "packed"
    convert(plain, folder)
    return folder


@pytest.fixture
def copy(sound, tmp_path):
    """A copy of the packed model, to be damaged."""
    return shutil.copytree(sound, tmp_path / "packed")


@pytest.fixture
def solving(recipe):
    """A recipe that needs hidden states between its blocks."""
    return recipe({"solver": "sparsegpt"})


@pytest.fixture
def stopped(solving, tmp_path):
    """The working folder of a run that stopped with two of three blocks finished."""
    commit = RunFolder.commit

    def stop(self, blocks, hidden, record):
        commit(self, blocks, hidden, record)
        if blocks == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "commit", stop)
        with pytest.raises(Killed):
            sparity.run(solving, output=tmp_path / "out")
    return tmp_path / "out.partial"
