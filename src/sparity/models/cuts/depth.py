"""Take whole blocks out of a model, or a block's attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models.block import Block, Projection
from sparity.models.families.base import Family

STEPS = ("decoder_sparse_step", "sliding_window_pattern", "interleave_moe_layer_step")  # rules by a block's number


def cut_depth(model: nn.Module, family: Family, kept: Tensor) -> dict[str, Any]:
    """Keep only some blocks, in place, and number them anew; the configuration's attributes that change.

    What a configuration lists for each block is cut with them; what it says by a rule of the block's number becomes a
    list where the configuration has one.

    Raises:
        InvalidInput: a rule by the block's number that no list can replace.
    """
    config: Any = model.config
    parent, _, last = family.blocks.rpartition(".")
    owner = model.get_submodule(parent)
    blocks = list(owner.get_submodule(last).children())
    changes = depth_changes(config, family, kept.tolist())
    left = nn.ModuleList(blocks[index] for index in kept.tolist())
    for number, block in enumerate(left):
        for module in block.modules():
            for name in ("layer_idx", "layer_id"):
                if isinstance(module.__dict__.get(name), int):
                    setattr(module, name, number)
    setattr(owner, last, left)
    for module in model.modules():  # some models keep the number beside the configuration
        if module.__dict__.get("num_hidden_layers") == len(blocks):
            module.num_hidden_layers = len(left)  # type: ignore[assignment]
    return changes


def depth_changes(config: Any, family: Family, kept: list[int]) -> dict[str, Any]:
    """The configuration's attributes when only some blocks stay."""
    total = int(config.num_hidden_layers)
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == total and name != "architectures":
            changes[name.lstrip("_")] = [value[index] for index in kept]
    if hasattr(config, "mlp_only_layers"):
        changes["mlp_only_layers"] = [new for new, old in enumerate(kept) if not family.experts(config, old)]
        if getattr(config, "decoder_sparse_step", 1) != 1:
            changes["decoder_sparse_step"] = 1
    for name in STEPS:
        step = getattr(config, name, None)
        if name in changes or step in (None, 1) or "layer_types" in changes:
            continue
        if any(new % step != old % step for new, old in enumerate(kept)):
            raise InvalidInput(
                f'depth: a configuration of type "{config.model_type}" tells its blocks apart by a rule of their '
                f"number ({name} = {step}), which would give blocks another kind: remove blocks in multiples of {step}"
            )
    return changes


@contextmanager
def silenced(block: Block) -> Iterator[None]:
    """`silence_attention` for a while; afterwards the block is what it was."""
    holders = [projection.module for projection in block.projections if projection.role == "o"]
    before = [{name: value.detach().clone() for name, value in module.named_parameters()} for module in holders]
    silence_attention(block)
    try:
        yield
    finally:
        for module, values in zip(holders, before, strict=True):
            for name, value in values.items():
                module.get_parameter(name).data.copy_(value)


def silence_attention(block: Block) -> None:
    """Let a block's attention add nothing: what it writes is zero, its bias too. Shapes stay.

    Raises:
        InvalidInput: the block has no attention.
    """
    outputs = [projection for projection in block.projections if projection.role == "o"]
    if not outputs:
        raise InvalidInput(f"{block.name} has no attention output that could be silenced: keep it")
    for projection in outputs:
        _zero(projection)


def _zero(projection: Projection) -> None:
    projection.write(torch.zeros_like(projection.weight))
    bias = getattr(projection.module, "bias", None)
    if bias is not None:
        rows = slice(None) if projection.rows is None else slice(*projection.rows)
        bias.data[rows] = 0
