"""A model whose parts are multiplied with masks while it runs, and the same with the masks in its weights.

Channels and heads are masked where the last projection of an MLP and of attention reads them, blocks where both write
into the residual stream, and the hidden size wherever it is written: by the embedding, by these projections, and by
norms, which then divide by the root mean square of the numbers that are not masked.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparity.models import Block, Projection
from sparity.models.cuts.hidden import block_norms, outside_blocks
from sparity.models.cuts.whole import blocks_of
from sparity.models.dimensions import DEPTH, HIDDEN, WRITE_HIDDEN, Dimension
from sparity.models.families.base import Family

Masks = Mapping[str, Tensor]  # dimension -> [rows, size]: rows of a block's own units, block by block, else one row
Factor = Callable[[Masks], Tensor | None]  # [channels] or [1]; None where none of the masks acts


@dataclass(frozen=True)
class Place:
    """A module whose inputs, or outputs, are multiplied.

    Attributes:
        module: a projection's, an embedding or a norm.
        factor: what they are multiplied with.
        projection: the projection in the module, where there is one.
        reads: inputs are multiplied, not outputs.
        folded: what its weights take, where that differs from the factor.
    """

    module: nn.Module
    factor: Factor
    projection: Projection | None = None
    reads: bool = False
    folded: Factor | None = None


def mask_places(model: nn.Module, family: Family) -> list[Place]:
    """Where masks act in a model in memory without experts."""
    blocks, places = blocks_of(model, family), list[Place]()
    config: Any = model.config
    for block in blocks:
        by_name = {projection.name: projection for projection in block.projections}
        for dimension in unit_dimensions(block, family, config):
            cut = next(cut for cut in dimension.cuts if cut.axis == "columns")
            units = partial(_units, dimension.name, block.index, len(blocks), cut.width)
            places.append(Place(by_name[cut.projection].module, units, by_name[cut.projection], reads=True))
        for projection in block.projections:
            if projection.role in WRITE_HIDDEN:
                places.append(Place(projection.module, partial(_written, block.index), projection))
        places += [Place(norm, _normed) for norm in block_norms(block, int(config.hidden_size))]
    outside = outside_blocks(model, family)
    tied = len({module.weight for module in outside if isinstance(module, nn.Embedding | nn.Linear)}) == 1
    for module in outside:
        if isinstance(module, nn.Embedding):
            places.append(Place(module, _stream))
        elif not isinstance(module, nn.Linear):  # a head that is the embedding has the mask in its weights already
            places.append(Place(module, _normed, folded=_shrink if tied else None))
    return places


def unit_dimensions(block: Block, family: Family, config: Any) -> tuple[Dimension, ...]:
    """What can be masked in a block: channels, heads, and query heads that share keys as a dimension of their own."""
    found = family.dimensions(block.module, block.name, config)
    heads = family.query_heads(block.module, block.name, config)
    return found if heads is None else (*found, heads)


@contextmanager
def masked(places: Sequence[Place], read: Callable[[], Masks]) -> Iterator[None]:
    """Within the context the model runs with the masks that `read` gives at that time."""

    def times(place: Place, x: Tensor) -> Tensor:
        factor = place.factor(read())
        return x if factor is None else x * factor.to(x)

    with ExitStack() as hooks:
        for place in places:
            if place.reads:

                def before(module: nn.Module, given: tuple[Any, ...], place: Place = place) -> Any:
                    return (times(place, given[0]), *given[1:])

                hooks.callback(place.module.register_forward_pre_hook(before).remove)
            else:

                def after(module: nn.Module, given: object, output: Tensor, place: Place = place) -> Tensor:
                    return times(place, output)

                hooks.callback(place.module.register_forward_hook(after).remove)
        yield


@torch.no_grad()
def fold(places: Sequence[Place], masks: Masks) -> None:
    """Write masks into the weights: the model alone then computes what it computed with them."""
    for place in places:
        factor = (place.folded or place.factor)(masks)
        if factor is None:
            continue
        weight = place.projection.weight if place.projection else place.module.get_parameter("weight").data
        factor = factor.to(weight)
        writes = place.projection is not None and not place.reads
        weight.mul_(factor[:, None] if writes else factor)
        if writes and place.module._parameters.get("bias") is not None:
            place.module.get_parameter("bias").mul_(factor)


def _units(dimension: str, index: int, blocks: int, width: int, masks: Masks) -> Tensor | None:
    """The masks of a block's own units, each for all its channels."""
    if dimension not in masks:
        return None
    return masks[dimension].view(blocks, -1)[index].repeat_interleave(width)


def _written(index: int, masks: Masks) -> Tensor | None:
    """The masks of all that a block writes into the residual stream."""
    stream = _stream(masks)
    if DEPTH not in masks:
        return stream
    whole = masks[DEPTH][0, index : index + 1]
    return whole if stream is None else whole * stream


def _stream(masks: Masks) -> Tensor | None:
    return masks[HIDDEN][0] if HIDDEN in masks else None


def _shrink(masks: Masks) -> Tensor | None:
    """What makes a norm over all numbers one over those that are not masked, `[1]`."""
    mask = _stream(masks)
    return None if mask is None else mask.new_tensor([math.sqrt(int(mask.count_nonzero()) / len(mask))])


def _normed(masks: Masks) -> Tensor | None:
    shrink, mask = _shrink(masks), _stream(masks)
    return None if shrink is None or mask is None else shrink * mask
