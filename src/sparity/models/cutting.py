"""Cut units out of a block: rows and columns of its stored parameters, its biases, and what its modules say of them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparity.models.block import Block, Projection, set_features, set_parameter
from sparity.models.dimensions import (
    KV_GROUPS,
    QUERY_HEADS,
    Cut,
    Dimension,
    check_groups,
    check_kept,
    cut_bias,
    cut_matrix,
    cuts_of,
)
from sparity.models.families.base import Family
from sparity.models.transformers import resized_config

_CHANNELS = ("intermediate_size", "intermediate_dim")
MODULE_ATTRIBUTES = {  # the configuration's attribute -> what the modules that keep a copy call it
    "intermediate_size": _CHANNELS,
    "moe_intermediate_size": _CHANNELS,
    "num_attention_heads": ("num_attention_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads",),
    "hidden_size": ("hidden_size", "hidden_dim", "embed_dim"),
    "num_local_experts": ("num_experts",),
    "num_experts": ("num_experts",),
}


def cut_block(block: Block, kept: Mapping[str, Tensor], family: Family, config: Any, check: bool = True) -> Block:
    """Keep only the given units of a block, in place; the sites of the block that comes back have the new shapes.

    `kept` maps names of dimensions to the int64 indices of the units that stay, in order; other dimensions stay whole.
    `config` is the configuration that fits the block as it is. The block's modules get a copy with the new sizes, which
    transformers is not asked about without `check`: blocks may then have shapes that no configuration can state.

    Raises:
        InvalidInput: indices that choose no units of the block, experts of different sizes, or sizes that the
            configuration cannot express (`Family.resize`). The block is then as it was.
    """
    dimensions = family.dimensions(block.module, block.name, config)
    if (heads := family.query_heads(block.module, block.name, config)) is not None:
        dimensions = (*dimensions, heads)
    check_kept(dimensions, kept, block.name)
    if heads is not None and QUERY_HEADS in kept:
        groups = next(found.size for found in dimensions if found.name == KV_GROUPS)
        check_groups(heads, groups, kept[QUERY_HEADS], block.name)
    changes = family.resize_block(config, block.index, {name: len(units) for name, units in kept.items()}, check)
    cut_projections(block.projections, dimensions, kept)
    if heads is not None:
        _tell_groups(block.module, changes)
    tell_modules(block.module, changes)
    sites = family.sites(block.module, block.name, resized_config(config, changes, check))
    return replace(block, sites=sites)


def cut_projections(
    projections: Iterable[Projection], dimensions: Iterable[Dimension], kept: Mapping[str, Tensor]
) -> None:
    """Keep only the given units of the projections that the dimensions run through, in place."""
    dimensions = tuple(dimensions)
    stored: dict[tuple[nn.Module, str], list[Projection]] = {}
    for projection in projections:
        stored.setdefault((projection.module, projection.parameter), []).append(projection)
    for parts in stored.values():
        cuts = {part.name: cuts_of(dimensions, part.name) for part in parts}
        if any(name in kept for named in cuts.values() for name in named):
            _cut_parameter(parts, cuts, kept)


def _cut_parameter(parts: list[Projection], cuts: Mapping[str, Mapping[str, Cut]], kept: Mapping[str, Tensor]) -> None:
    """Cut a stored parameter that consists of `parts`, and the bias beside it."""
    parts = sorted(parts, key=lambda part: (part.expert or 0, part.rows or (0, 0)))
    module, name, transposed = parts[0].module, parts[0].parameter, parts[0].transposed
    bias = getattr(module, "bias", None) if name == "weight" else None
    if bias is not None:
        shown = [bias.data if part.rows is None else bias.data[slice(*part.rows)] for part in parts]
        left = [cut_bias(values, cuts[part.name], kept) for part, values in zip(parts, shown, strict=True)]
        set_parameter(module, "bias", torch.cat(left))
    by_expert: dict[int | None, list[Tensor]] = {}
    for part in parts:
        by_expert.setdefault(part.expert, []).append(cut_matrix(part.weight, cuts[part.name], kept))
    matrices = [torch.cat(rows) for rows in by_expert.values()]  # each [out, in]
    if None not in by_expert:
        set_parameter(module, name, torch.stack(matrices))
        return
    set_parameter(module, name, matrices[0].T.contiguous() if transposed else matrices[0])
    set_features(module, *matrices[0].shape)


def _tell_groups(block: nn.Module, changes: Mapping[str, Any]) -> None:
    """Keep true how many query heads share a key-value head."""
    heads, key_heads = changes.get("num_attention_heads"), changes.get("num_key_value_heads")
    for module in block.modules():
        old = module.__dict__.get("num_key_value_groups")
        if old is None or "config" not in module.__dict__ or heads is None:
            continue
        module.num_key_value_groups = heads // (key_heads or module.config.num_key_value_heads)  # type: ignore[union-attr]


def tell_modules(block: nn.Module, changes: Mapping[str, Any]) -> None:
    """Keep what the modules say of their sizes true."""
    for module in block.modules():
        if changes and "config" in module.__dict__:
            module.config = resized_config(module.config, changes, check=False)
        for attribute, value in changes.items():
            for name in MODULE_ATTRIBUTES.get(attribute, ()):
                if name in module.__dict__:
                    setattr(module, name, value)
