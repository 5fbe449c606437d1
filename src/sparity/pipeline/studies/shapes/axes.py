"""What a uniform shape can vary: the sizes that a dimension may have, and the importance that each gives up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.depth import depth_changes
from sparity.models.cuts.outline import outlined
from sparity.models.dimensions import CHANNELS, DEPTH, HIDDEN
from sparity.models.ragged import is_ragged
from sparity.static.structure.units import check_names, largest, rows_of

ALIGNED = (CHANNELS, HIDDEN)  # their sizes are widths of matrices


@dataclass(frozen=True)
class Grid:
    """Which sizes are tried: multiples of 1 / `steps` of the whole, none below the share `least`.

    Widths of matrices are rounded up to a multiple of `multiple_of`.
    """

    steps: int = 8
    multiple_of: int = 32
    least: float = 0.25

    def __post_init__(self) -> None:
        if self.steps < 1 or self.multiple_of < 1 or not 0 <= self.least <= 1:
            raise InvalidInput("a shape's steps and multiple_of must be 1 or more, least from 0 to 1")

    def sizes(self, dimension: str, whole: int) -> tuple[int, ...]:
        """The sizes of a dimension of `whole` units, ascending; the last is the whole."""
        step = self.multiple_of if dimension in ALIGNED else 1
        found = {min(-(-whole * k // (self.steps * step)) * step, whole) for k in range(1, self.steps + 1)}
        return tuple(sorted(size for size in found if size >= self.least * whole))


@dataclass(frozen=True)
class Axis:
    """A dimension that may become smaller.

    Attributes:
        name: the dimension.
        whole: its units now.
        sizes: that it may have, ascending; the last is the whole.
        losses: of each size the share of importance that goes, the mean over blocks.
    """

    name: str
    whole: int
    sizes: tuple[int, ...]
    losses: tuple[float, ...]

    def loss(self, size: int) -> float:
        """Of one of its sizes."""
        return self.losses[self.sizes.index(size)]


def axes_of(decoder: Decoder, scores: Mapping[str, Tensor], wanted: Sequence[str] | None, grid: Grid) -> list[Axis]:
    """The axes of a model that has been scored, in the order in which a recipe cuts them.

    Without `wanted`, every dimension that its scores and its family know and that has another size than the whole.

    Raises:
        InvalidInput: a model with experts or with blocks that differ, or a wanted dimension that it cannot lose.
    """
    _check(decoder)
    offered = {name: size for name, size in _wholes(decoder).items() if name in scores}
    check_names(wanted or (), offered, "the score")
    axes = []
    for name, whole in offered.items():
        if wanted is not None and name not in wanted:
            continue
        able, refused = _able(decoder, scores, name, grid.sizes(name, whole), whole)
        if len(able) > 1:
            axes.append(Axis(name, whole, able, tuple(lost(scores[name], size) for size in able)))
        elif wanted is not None:
            raise InvalidInput(refused or f"{name}: no size below {whole} is tried: raise steps, or lower least")
    if not axes:
        raise InvalidInput("there is no dimension of this model that could be smaller: raise steps, or lower least")
    return axes


def lost(scores: Tensor, size: int) -> float:
    """The share of importance that goes when the best `size` units of each row of `scores` stay, the mean over rows.

    Scores below zero count as zero; where all are zero, units count alike.
    """
    shares = []
    for row in rows_of(scores.view(1, -1) if scores.ndim == 1 else scores):
        if row is None:
            continue
        worth = row.double().clamp_min(0)
        worth = worth if worth.sum() > 0 else worth + 1
        shares.append(1 - float(worth[largest(row, size)].sum() / worth.sum()) if size < len(row) else 0.0)
    return sum(shares) / len(shares)


def _wholes(decoder: Decoder) -> dict[str, int]:
    """Dimension -> its units; depth first, whose choice reads the scores of the model as it is."""
    inside = {dimension.name: dimension.size for dimension in decoder.dimensions(0)}
    return {DEPTH: len(decoder), **inside, HIDDEN: int(decoder.config.hidden_size)}


def _able(
    decoder: Decoder, scores: Mapping[str, Tensor], name: str, sizes: Sequence[int], whole: int
) -> tuple[tuple[int, ...], str | None]:
    """Those of `sizes` that the model's family allows alone, and why not the others."""
    able, reason = [], None
    for size in sizes:
        try:
            if name == DEPTH and size < whole:
                depth_changes(decoder.config, decoder.family, largest(scores[DEPTH], size).tolist())
            elif size < whole:
                outlined(decoder, {name: size}, {})
            able.append(size)
        except InvalidInput as error:
            reason = str(error)
    return tuple(able), reason


def _check(decoder: Decoder) -> None:
    """Refuse models whose blocks are not all alike."""
    if is_ragged(decoder.config):
        raise InvalidInput("the blocks of this model have different sizes already: plan the shape of the model before")
    if any(decoder.family.experts(decoder.config, index) for index in range(len(decoder))):
        raise InvalidInput("shapes are planned for models without experts: cut those by a recipe (`structure`)")
    shapes = [
        [tuple(p.weight.shape) for site in decoder.sites(index) for p in site.projections]
        for index in range(len(decoder))
    ]
    if any(one != other for one, other in pairwise(shapes)):
        raise InvalidInput("the blocks of this model differ in their matrices: no one shape holds for all")
