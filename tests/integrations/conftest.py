"""Pruned tiny models to pack."""

import pytest

import sparity


@pytest.fixture
def plain(family_models, token_files, tmp_path):
    """A function that prunes a tiny model of a family and saves it, in bfloat16, plain."""

    def make(family="llama", prune=None, name="plain", **sections):
        recipe = {
            "dtype": "bfloat16",
            "calibration": {"tokens": token_files["calibration"], "batch": 4},
            "stages": [{"prune": {"unseen_expert": "magnitude", **(prune or {"solver": "sparsegpt"})}}],
            "measure": {"speed": None},
            **sections,
        }
        return sparity.run(recipe, model=family_models[family], output=tmp_path / name, device="cpu").path

    return make
