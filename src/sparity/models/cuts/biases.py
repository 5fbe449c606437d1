"""Add constants to what projections give: biases, in whatever way the configuration can say that there are some."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparity.models.block import Block, Projection

FLAGS = {"attention_bias": ("q", "k", "v", "o", "qkv"), "mlp_bias": ("gate", "up", "down")}


def add_biases(config: Any, blocks: Sequence[Block], added: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add a vector `[out]` to what each named projection gives, in place; the configuration's attributes that change.

    A projection without a bias gets one. Where a configuration switches the biases of several projections on together,
    all of them get one, zeros where nothing is added. Where it cannot, the model is no stock one afterwards.
    """
    changes: dict[str, Any] = {}
    everywhere = [projection for block in blocks for projection in block.projections]
    lacking = {projection.role for projection in everywhere if projection.name in added and not _has(projection)}
    for flag, roles in FLAGS.items():
        if lacking & set(roles) and getattr(config, flag, None) is False:
            changes[flag] = True
            for projection in everywhere:
                if projection.role in roles and not _has(projection):
                    _give(projection)
    for projection in everywhere:
        if projection.name in added:
            if not _has(projection):
                _give(projection)
            bias: Any = projection.module.bias
            rows = slice(None) if projection.rows is None else slice(*projection.rows)
            bias.data[rows] += added[projection.name].to(bias)
    return changes


def bias_flags(config: Any, wanted: Sequence[Projection]) -> dict[str, Any] | None:
    """The attributes by which a configuration says that these projections have biases; None where it cannot."""
    changes: dict[str, Any] = {}
    for projection in wanted:
        if _has(projection):
            continue
        flag = next((f for f, roles in FLAGS.items() if projection.role in roles and hasattr(config, f)), None)
        if flag is None:
            return None
        changes[flag] = True
    return changes


def _has(projection: Projection) -> bool:
    return getattr(projection.module, "bias", None) is not None


def _give(projection: Projection) -> None:
    weight = projection.stored
    outputs = weight.shape[1] if projection.transposed else weight.shape[0]
    projection.module.bias = nn.Parameter(torch.zeros(outputs).to(weight), requires_grad=weight.requires_grad)
