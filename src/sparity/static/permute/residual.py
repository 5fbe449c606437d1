"""One order for the numbers of the residual stream, in everything that reads or writes it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparity.models import Block, Decoder, Projection
from sparity.models.cuts.hidden import block_norms, routers
from sparity.models.cutting import cut_projections
from sparity.models.dimensions import HIDDEN, READ_HIDDEN, WRITE_HIDDEN, hidden_dimension
from sparity.static.permute.search import column_order

RESIDUAL = "residual"
MOST_ROWS = 1 << 14  # of all readers' scores together


class Stream:
    """Scores of the columns of everything that reads the residual stream; of many rows a sample.

    Of every matrix every so many rows are taken, so that all matrices of all blocks have their share.
    """

    def __init__(self, size: int) -> None:
        self._size, self._parts, self._rows = size, list[Tensor](), 0

    @staticmethod
    def declines(model: Decoder) -> str | None:
        """Why the residual stream of a model cannot be reordered, or None."""
        size = int(model.config.hidden_size)
        for name, shape in model.rest_shapes().items():
            if shape[-1:] != (size,):
                return f"{name} {list(shape)} does not end in the hidden size"
        return None

    def reads(self, projection: Projection) -> bool:
        """Whether a projection reads the stream."""
        return projection.role in READ_HIDDEN and projection.weight.shape[1] == self._size

    def add(self, score: Tensor) -> None:
        """One matrix's scores `[rows, hidden]`; each matrix counts as much as another per row."""
        sample = score.float().cpu()[:: max(len(score) // 256, 1)]
        self._parts.append(sample / sample.mean().clamp_min(torch.finfo(sample.dtype).tiny))

    def order(self, pattern: tuple[int, int], sweeps: int, seed: int) -> Tensor:
        """The best order that is found, int64 `[hidden]`."""
        every = torch.cat(self._parts)
        return column_order(every[:: -(-len(every) // MOST_ROWS)], *pattern, sweeps, seed)


def reorder_block(block: Block, order: Tensor, size: int) -> set[str]:
    """Reorder the stream in a block, in place; the names of the projections that changed."""
    dimension = hidden_dimension(block.projections, size)
    cut_projections(block.projections, [dimension], {HIDDEN: order})
    for module in (*block_norms(block, size), *routers(block)):
        for parameter in module.parameters(recurse=False):
            if parameter.shape[-1:] == (size,):
                parameter.data = parameter.data[..., order.to(parameter.device)].contiguous()
    return {projection.name for projection in block.projections if projection.role in READ_HIDDEN + WRITE_HIDDEN}


def reorder_rest(rest: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Embedding, positions, last norm and head."""
    return {name: tensor[..., order.to(tensor.device)].contiguous() for name, tensor in rest.items()}
