"""Small sweeps."""

import pytest


@pytest.fixture
def plan(tiny_llama_folder, token_files):
    """Magnitude and Wanda at two sparsities, measured on one text."""
    return {
        "base": {
            "model": str(tiny_llama_folder),
            "calibration": {"tokens": token_files["calibration"], "batch": 3},
            "stages": [{"prune": {}}],
            "measure": {"perplexity": [token_files["text"]], "window": 32, "windows": 2},
        },
        "vary": {
            "method": {"magnitude": {"stages.0.prune.score": "magnitude"}, "wanda": {"stages.0.prune.score": "wanda"}},
            "stages.0.prune.sparsity": [0.25, 0.5],
        },
    }


@pytest.fixture
def small(plan):
    """Two combinations, one of which carries hidden states from block to block."""
    vary = {
        "method": {
            "magnitude": {"stages.0.prune.score": "magnitude"},
            "sparsegpt": {"stages.0.prune.solver": "sparsegpt"},
        }
    }
    return {**plan, "vary": vary}
