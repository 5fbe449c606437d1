"""A pruned model whose files are rewritten in old layouts."""

import pytest
import torch

from families import build, tiny_configs


@pytest.fixture(scope="session")
def sparse(tmp_path_factory):
    """A tiny Llama in bfloat16 whose projections keep two of four weights, with a bias here and there."""
    model = build(tiny_configs()["llama"]).bfloat16()
    model.config.dtype = torch.bfloat16
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                order = torch.rand(*weight.shape[:-1], weight.shape[-1] // 4, 4).argsort(-1)
                weight[(order >= 2).flatten(1)] = 0
    folder = tmp_path_factory.mktemp("sparse") / "model"
    model.save_pretrained(folder)
    return folder
