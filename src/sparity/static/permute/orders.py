"""Orders of a block's channels that cost nothing at run time, and how they are put into effect."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparity.models import Block, Projection
from sparity.models.cutting import cut_projections
from sparity.models.dimensions import CHANNELS, Cut, Dimension, mlp_channels, value_parts
from sparity.static.permute.search import column_order

VALUES = "values"  # what v gives and o reads, within each head
ROWS_OF_VALUES, COLUMNS_OF_HEADS = "rows of v", "columns of o"


def readers(dimensions: Sequence[Dimension], projections: Sequence[Projection], where: Iterable[str]) -> set[str]:
    """The projections whose columns can be reordered: what they read is written within the block."""
    found = set()
    if CHANNELS in where:
        found |= {cut.projection for each in mlp_channels(dimensions) for cut in each.cuts if cut.axis == "columns"}
    if VALUES in where and (parts := value_parts(dimensions, projections)) is not None:
        found.add(parts[1].name)
    return found


def found_orders(
    dimensions: Sequence[Dimension],
    projections: Sequence[Projection],
    scores: Mapping[str, Tensor],
    pattern: tuple[int, int],
    sweeps: int,
    seed: int,
) -> dict[str, list[int]]:
    """The order of each dimension of a block whose reader has scores `[out, in]`; of values the heads' in a row."""
    found: dict[str, list[int]] = {}
    for dimension in mlp_channels(dimensions):
        reader = next(cut.projection for cut in dimension.cuts if cut.axis == "columns")
        if reader in scores:
            found[dimension.name] = column_order(scores[reader], *pattern, sweeps, seed).tolist()
    parts = value_parts(dimensions, projections)
    if parts is not None and parts[1].name in scores:
        _, out, heads = parts
        width = parts[0].weight.shape[0] // heads
        by_head = scores[out.name].view(
            len(scores[out.name]), heads, -1, width
        )  # [rows, kv heads, queries' heads, width]
        found[VALUES] = []
        for head in range(heads):
            together = by_head[:, head].transpose(0, 1).reshape(-1, width)  # all query heads that share its values
            found[VALUES] += column_order(together, *pattern, sweeps, seed).tolist()
    return found


def reorder(block: Block, dimensions: Sequence[Dimension], orders: Mapping[str, Sequence[int]]) -> list[Projection]:
    """Put a block's channels into other orders, in place; the projections that changed."""
    kept = {name: torch.tensor(order) for name, order in orders.items() if name != VALUES}
    every = [each for each in dimensions if each.name in kept]
    parts = value_parts(dimensions, block.projections)
    if VALUES in orders and parts is not None:
        values, out, heads = parts
        within = torch.tensor(orders[VALUES]).view(heads, -1)  # [kv heads, width]
        shared, width = out.weight.shape[1] // within.numel(), within.shape[1]
        of_values = torch.arange(heads)[:, None] * width + within
        places = torch.arange(heads * shared).view(heads, shared, 1) * width
        kept[ROWS_OF_VALUES], kept[COLUMNS_OF_HEADS] = of_values.flatten(), (places + within[:, None]).flatten()
        every.append(Dimension(ROWS_OF_VALUES, len(kept[ROWS_OF_VALUES]), (Cut(values.name, "rows", 1),)))
        every.append(Dimension(COLUMNS_OF_HEADS, len(kept[COLUMNS_OF_HEADS]), (Cut(out.name, "columns", 1),)))
    cut_projections(block.projections, every, kept)
    touched = {cut.projection for each in every for cut in each.cuts}
    return [projection for projection in block.projections if projection.name in touched]
