"""Which rows and columns of a block's projections belong together: cut at once, they leave a smaller block of its kind.

The dimensions of a block are MLP channels (of each expert where a block has experts) and attention heads: a query head
with its own key-value head, or a key-value head with the query heads that share it; where several share one, equally
many of each group can also be cut alone. The hidden size, whole experts and whole blocks concern more than a block's
projections: `whole_cuts` cuts them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models.block import Projection

CHANNELS = "mlp_channels"  # of expert E: "mlp_channels.E"
KV_GROUPS = "kv_groups"
QUERY_HEADS = "query_heads"
HIDDEN = "hidden_size"
EXPERTS = "experts"
DEPTH = "depth"
READ_HIDDEN = ("q", "k", "v", "qkv", "gate", "up", "fc1")  # roles of the projections that read the residual stream
WRITE_HIDDEN = ("o", "down", "fc2")  # and of those that write into it


@dataclass(frozen=True)
class Cut:
    """How a dimension runs through one projection: unit u takes rows or columns u * width to (u + 1) * width."""

    projection: str
    axis: Literal["rows", "columns"]
    width: int

    def indices(self, units: Tensor) -> Tensor:
        """The rows or columns of the given units, both int64."""
        return (units[:, None] * self.width + torch.arange(self.width, device=units.device)).flatten()


@dataclass(frozen=True)
class Dimension:
    """`size` units of a block, each of which can be taken out of all projections in `cuts` at once."""

    name: str
    size: int
    cuts: tuple[Cut, ...]


def cuts_of(dimensions: Iterable[Dimension], projection: str) -> dict[str, Cut]:
    """Name of each dimension that runs through a projection -> its cut there."""
    return {dimension.name: cut for dimension in dimensions for cut in dimension.cuts if cut.projection == projection}


def cut_matrix(matrix: Tensor, cuts: Mapping[str, Cut], kept: Mapping[str, Tensor]) -> Tensor:
    """What is left of a tensor `[out, in]` of a projection, such as its weight or a mask, when only `kept` units stay.

    `cuts` are those of the projection (`cuts_of`); dimensions that `kept` does not name stay whole.
    """
    for name, cut in cuts.items():
        if name in kept:
            axis = 0 if cut.axis == "rows" else 1
            matrix = matrix.index_select(axis, cut.indices(kept[name]).to(matrix.device))
    return matrix


def cut_bias(bias: Tensor, cuts: Mapping[str, Cut], kept: Mapping[str, Tensor]) -> Tensor:
    """What is left of a projection's bias `[out]`: it follows the rows, not the columns."""
    rows = {name: cut for name, cut in cuts.items() if cut.axis == "rows"}
    return cut_matrix(bias[:, None], rows, kept)[:, 0]


def check_kept(dimensions: Sequence[Dimension], kept: Mapping[str, Tensor], where: str) -> None:
    """Refuse indices that do not choose some units of a block's dimensions, in order and each once.

    Raises:
        InvalidInput: no such dimension, no int64 vector, or indices that are empty, unsorted, repeated or out of range.
    """
    sizes = {dimension.name: dimension.size for dimension in dimensions}
    for name, units in kept.items():
        if name not in sizes:
            offered = ", ".join(sizes) or "none"
            raise InvalidInput(f'{where} has no dimension "{name}": it has {offered}')
        place = f"{where}, {name}"
        if units.dtype != torch.int64 or units.ndim != 1:
            raise InvalidInput(f"{place}: the kept units are a vector of int64, not {units.dtype} {list(units.shape)}")
        if not len(units):
            raise InvalidInput(f"{place}: no unit is kept: keep one at least")
        if (units.diff() <= 0).any():
            raise InvalidInput(f"{place}: the kept units are unsorted or repeated: sort them and name each once")
        if units[0] < 0 or units[-1] >= sizes[name]:
            low, high, last = int(units[0]), int(units[-1]), sizes[name] - 1
            raise InvalidInput(f"{place}: kept units run from {low} to {high}, but there are only 0 to {last}")


def channel_dimensions(projections: Iterable[Projection]) -> Iterator[Dimension]:
    """The channels between an MLP's first and last projections, for each expert where there are experts."""
    mlps: dict[int | None, dict[str, Projection]] = {}
    for projection in projections:
        mlps.setdefault(projection.expert, {})[projection.role] = projection
    for expert, roles in mlps.items():
        first = [roles[role] for role in ("gate", "up", "fc1") if role in roles]
        last = roles.get("down") or roles.get("fc2")
        if not first or last is None:
            continue
        size = last.weight.shape[1]
        if all(projection.weight.shape[0] == size for projection in first):
            rows = (Cut(projection.name, "rows", 1) for projection in first)
            name = CHANNELS if expert is None else f"{CHANNELS}.{expert}"
            yield Dimension(name, size, (*rows, Cut(last.name, "columns", 1)))


def head_dimension(projections: Iterable[Projection], head_width: int) -> Dimension | None:
    """The key-value heads, each with its query heads; None where the shapes are not those of plain attention.

    A matrix of role "qkv" holds q, k and v head by head.
    """
    roles = {projection.role: projection for projection in projections if projection.expert is None}
    if "o" not in roles:
        return None
    heights = {role: roles[role].weight.shape[0] for role in ("q", "k", "v", "qkv") if role in roles}
    columns = roles["o"].weight.shape[1]
    heads, key_heads = columns // head_width, heights.get("k", columns) // head_width
    keys = key_heads * head_width
    plain = ({"q": columns, "k": keys, "v": keys}, {"qkv": 3 * columns})
    if heights not in plain or not key_heads or heads % key_heads or columns % head_width:
        return None
    rows = (Cut(roles[role].name, "rows", height // key_heads) for role, height in heights.items())
    name = QUERY_HEADS if heads == key_heads else KV_GROUPS
    return Dimension(name, key_heads, (*rows, Cut(roles["o"].name, "columns", columns // key_heads)))


def query_head_dimension(projections: Iterable[Projection], groups: Dimension, head_width: int) -> Dimension | None:
    """The query heads of key-value heads that several of them share; None where each has its own.

    The same number must stay of every group, since stock models repeat each key-value head equally often.
    """
    if groups.name != KV_GROUPS:
        return None
    roles = {projection.name: projection.role for projection in projections}
    cuts = (cut for cut in groups.cuts if roles[cut.projection] in ("q", "o"))
    found = tuple(Cut(cut.projection, cut.axis, head_width) for cut in cuts)
    size = groups.size * next(cut.width for cut in groups.cuts if cut.axis == "columns") // head_width
    return Dimension(QUERY_HEADS, size, found)


def mlp_channels(dimensions: Iterable[Dimension]) -> list[Dimension]:
    """Of a block's dimensions its MLP channels, those of every expert apart."""
    return [found for found in dimensions if found.name.partition(".")[0] == CHANNELS]


def value_parts(
    dimensions: Iterable[Dimension], projections: Iterable[Projection]
) -> tuple[Projection, Projection, int] | None:
    """v, o and the number of key-value heads, where o reads what v writes, number by number; else None."""
    roles = {projection.role: projection for projection in projections if projection.expert is None}
    heads = next((found for found in dimensions if found.name in (KV_GROUPS, QUERY_HEADS)), None)
    if heads is None or "v" not in roles or "o" not in roles:
        return None
    return roles["v"], roles["o"], heads.size


def hidden_dimension(projections: Iterable[Projection], size: int) -> Dimension:
    """The residual stream as it runs through a block's projections."""
    cuts = tuple(
        Cut(projection.name, "columns" if projection.role in READ_HIDDEN else "rows", 1)
        for projection in projections
        if projection.role in READ_HIDDEN + WRITE_HIDDEN
    )
    return Dimension(HIDDEN, size, cuts)


def check_groups(heads: Dimension, groups: int, kept: Tensor, where: str) -> None:
    """Refuse query heads of which the key-value heads would not be left equally many.

    Raises:
        InvalidInput: it names how many each group would keep.
    """
    counts = torch.bincount(kept // (heads.size // groups), minlength=groups).tolist()
    if len(set(counts)) > 1:
        raise InvalidInput(
            f"{where}, {QUERY_HEADS}: the key-value heads would keep {', '.join(map(str, counts))} query heads: keep "
            "equally many of each"
        )


def bystanders(block: nn.Module, projections: Iterable[Projection], dimension: Dimension) -> list[nn.Parameter]:
    """Parameters that lie in the same module as a dimension's projections and belong to no projection.

    A norm over all heads is one: a cut would change what it computes. Projections of experts and those that lie in the
    block itself have none.
    """
    named = {cut.projection for cut in dimension.cuts}
    paths = {module: path for path, module in block.named_modules()}
    own = {projection.module for projection in projections}
    around = {paths[p.module].rpartition(".")[0] for p in projections if p.name in named and p.expert is None}
    return [
        parameter
        for path in around - {""}
        for module in block.get_submodule(path).modules()
        if module not in own
        for parameter in module.parameters(recurse=False)
    ]
