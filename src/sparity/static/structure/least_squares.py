"""The linear map that does best what some blocks do."""

import torch
from torch import Tensor

from sparity.models import Block
from sparity.models.cuts.experts import experts_module
from sparity.static.structure.subject import Subject


def mlp_outputs(subject: Subject, block: Block, hidden: Tensor) -> Tensor:
    """What the MLP of a block gives on hidden states `[samples, tokens, hidden]`."""
    last = [projection.module for projection in block.projections if projection.role in ("down", "fc2")]
    module = experts_module(block) or last[0]
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, given, output: found.append(output))
    try:
        block.run(subject.decoder.inputs(subject.tokens, 1), hidden)
    finally:
        handle.remove()
    return torch.stack([part.view(hidden.shape[1:]) for part in found])


def least_squares(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """The matrix T for which x T is nearest to y, both `[samples, tokens, hidden]` in float64."""
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solved: Tensor = torch.linalg.solve(gram, x.T @ y)
    return solved
