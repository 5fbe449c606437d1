"""What one stage did to one projection: plain data for reports, tables, pages and the record of a run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sparity.models import Projection


@dataclass(frozen=True)
class Change:
    """One projection before and after one stage.

    Attributes:
        stage: the stage's name in recipes.
        name: the projection.
        role: its role in the block, such as `q` or `down`.
        block: the number of its block, from 0.
        shape_before: `[out, in]`.
        shape_after: `[out, in]`.
        zeros: the share of its weights that are zero after the stage.
        target: the share that the stage was to remove or skip; None where it was not asked for one.
        skipped: the share of its input channels that are skipped at run time, measured on calibration text.
        bits: bits per stored weight, where the stage changed them.
        loss: the share of its output's energy on calibration text that the stage lost.
    """

    stage: str
    name: str
    role: str
    block: int
    shape_before: tuple[int, int]
    shape_after: tuple[int, int]
    zeros: float
    target: float | None = None
    skipped: float | None = None
    bits: float | None = None
    loss: float | None = None

    @classmethod
    def of(
        cls, stage: str, projection: Projection, block: int, before: Sequence[int] | None = None, **found: float | None
    ) -> "Change":
        """What a stage left of a projection, as it now is.

        Args:
            stage: the stage's name.
            projection: after the edit; its zeros are counted.
            block: its block's number.
            before: `[out, in]` before the edit; None where the shape stayed.
            found: `target`, `skipped`, `bits` or `loss`.
        """
        rows, columns = projection.weight.shape
        count = projection.weight.numel()
        zeros = (count - int(projection.weight.count_nonzero())) / count
        was = (rows, columns) if before is None else (before[0], before[1])
        return cls(stage, projection.name, projection.role, block, was, (rows, columns), zeros, **found)

    @classmethod
    def planned(cls, stage: str, projection: Projection, block: int, zeros: float = 0.0, **found: float | None) -> Self:
        """What a stage that keeps a projection's shape is expected to leave of it, known without its weights.

        Args:
            stage: the stage's name.
            projection: by its shape alone.
            block: its block's number.
            zeros: the share of its weights that will be zero.
            found: `target`, `skipped`, `bits` or `loss`.
        """
        shape = (projection.weight.shape[0], projection.weight.shape[1])
        return cls(stage, projection.name, projection.role, block, shape, shape, zeros, **found)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Change":
        """From JSON; raises `KeyError` or `TypeError` for something else."""
        shapes = {key: tuple(content[key]) for key in ("shape_before", "shape_after")}
        if not all(len(shape) == 2 and all(type(side) is int for side in shape) for shape in shapes.values()):
            raise TypeError(f"shapes {shapes}")
        return cls(**{**content, **shapes})

    @property
    def size_before(self) -> int:
        """Weights before the stage."""
        return math.prod(self.shape_before)

    @property
    def size(self) -> int:
        """Weights after the stage."""
        return math.prod(self.shape_after)

    @property
    def removed(self) -> float:
        """The share of the weights before the stage that are zero or gone after it."""
        return 1 - self.size * (1 - self.zeros) / self.size_before


def last_of_each(changes: Iterable[Change]) -> dict[str, Change]:
    """Projection -> the last change that it went through."""
    return {change.name: change for change in changes}
