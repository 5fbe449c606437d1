"""A small recipe, a model folder to damage, and what every refusal has in common."""

import re
import shutil

import pytest
import torch

import sparity


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small gain nothing from a second thread, and tests that run side by side lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
