"""Where the channels that a projection reads are written, so that both can be scaled and nothing changes."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparity.models import Block, Projection
from sparity.models.cuts.hidden import block_norms, is_plain_rms, routers
from sparity.models.dimensions import CHANNELS, Dimension, mlp_channels, value_parts

NORMS, VALUES = "norms", "values"
READERS = (("q", "k", "v", "qkv"), ("gate", "up", "fc1"))  # of the first and of the second norm of a block


@dataclass(frozen=True)
class Source:
    """Channels of a block, with everything that writes and reads them.

    Attributes:
        readers: projections whose columns they are.
        units: int64 `[columns]`, the written number that each column reads: several where heads share values.
        norm: what writes them, or None.
        writer: the projection whose rows they are, or None.
        beside: other modules whose `weight` has these columns, such as a router.
    """

    readers: tuple[Projection, ...]
    units: Tensor
    norm: nn.Module | None = None
    writer: Projection | None = None
    beside: tuple[nn.Module, ...] = field(default=())

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All of them."""
        return self.readers if self.writer is None else (*self.readers, self.writer)

    def shared(self, found: Tensor, how: str) -> Tensor:
        """`[columns]` -> `[columns]`: the mean or the largest (`amax`) of all columns that read the same number."""
        total = torch.zeros(int(self.units.max()) + 1, dtype=found.dtype)
        return total.scatter_reduce(0, self.units, found, how, include_self=False)[self.units]

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiply every column with `factors` `[columns]`, and divide what writes it."""
        for reader in self.readers:
            reader.write(reader.weight.float() * factors)
        for module in self.beside:
            module.get_parameter("weight").data.mul_(factors)
        written = torch.ones(int(self.units.max()) + 1).scatter(0, self.units, factors)
        if self.norm is not None:
            for parameter in self.norm.parameters(recurse=False):
                parameter.data.copy_(parameter.data.float() / written)
        if self.writer is not None:
            self.writer.write(self.writer.weight.float() / written[:, None])
            bias = getattr(self.writer.module, "bias", None)
            if bias is not None:
                part = bias.data if self.writer.rows is None else bias.data[slice(*self.writer.rows)]
                part.copy_(part.float() / written)


def sources_of(
    block: Block, dimensions: Collection[Dimension], config: Any, where: Collection[str]
) -> Iterator[Source]:
    """The channels of a block that can be scaled; `where` has some of norms, values and mlp_channels."""
    size = int(config.hidden_size)
    if NORMS in where and (norms := _norms(block, config)) is not None:
        for norm, roles in zip(norms, READERS, strict=True):
            readers = tuple(projection for projection in block.projections if projection.role in roles)
            beside = tuple(routers(block)) if roles == READERS[1] else ()
            if readers:
                yield Source(readers, torch.arange(size), norm=norm, beside=beside)
    parts = value_parts(dimensions, block.projections)
    if VALUES in where and parts is not None:
        values, out, heads = parts
        width = values.weight.shape[0] // heads
        shared = out.weight.shape[1] // values.weight.shape[0]
        units = torch.arange(heads * width).view(heads, 1, width).expand(heads, shared, width)
        yield Source((out,), units.flatten(), writer=values)
    if CHANNELS in where:
        by_name = {projection.name: projection for projection in block.projections}
        for dimension in mlp_channels(dimensions):
            cuts = {by_name[cut.projection].role: by_name[cut.projection] for cut in dimension.cuts}
            if {"gate", "up", "down"} <= cuts.keys():  # behind a gate, a channel is proportional to the row of up
                yield Source((cuts["down"],), torch.arange(dimension.size), writer=cuts["up"])


def _norms(block: Block, config: Any) -> list[nn.Module] | None:
    """The norms before attention and before the MLP, where they are two whose weights multiply what they give."""
    size = int(config.hidden_size)
    found = block_norms(block, size)
    before = getattr(config, "do_layer_norm_before", True)
    known = all(isinstance(norm, nn.LayerNorm) or is_plain_rms(norm, size) for norm in found)
    return found if len(found) == len(READERS) and before and known else None
