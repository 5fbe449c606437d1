"""What one stage did to one projection: plain data for reports, tables, pages and the record of a run."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


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


@dataclass(frozen=True)
class Outcome:
    """What became of one projection over all stages.

    Attributes:
        stages: those that had to do with it, in order.
        target: the share of zeros that the last stage that was asked for one was asked for.
        skip_target: the same for input channels that are skipped.
        loss: of the last stage that measured one.
    """

    name: str
    role: str
    block: int
    stages: tuple[str, ...]
    shape_before: tuple[int, int]
    shape_after: tuple[int, int]
    zeros: float
    target: float | None
    skipped: float | None
    skip_target: float | None
    bits: float | None
    loss: float | None

    @property
    def size_before(self) -> int:
        """Weights of the dense model's projection."""
        return math.prod(self.shape_before)

    @property
    def size(self) -> int:
        """Weights that are left, zeros among them."""
        return math.prod(self.shape_after)

    @property
    def read(self) -> float:
        """The share of the dense model's weights that are read for a token: what is left, not zero and not skipped."""
        return self.size / self.size_before * (1 - self.zeros) * (1 - (self.skipped or 0.0))


def outcomes(changes: Iterable[Change]) -> tuple[Outcome, ...]:
    """One per projection, in the order of its first change."""
    gone_through: dict[str, list[Change]] = {}
    for change in changes:
        gone_through.setdefault(change.name, []).append(change)
    return tuple(_outcome(found) for found in gone_through.values())


def _outcome(found: list[Change]) -> Outcome:
    first, last = found[0], found[-1]

    def latest(values: Iterable[float | None]) -> float | None:
        return next((value for value in reversed(list(values)) if value is not None), None)

    return Outcome(
        name=first.name,
        role=first.role,
        block=first.block,
        stages=tuple(dict.fromkeys(change.stage for change in found)),
        shape_before=first.shape_before,
        shape_after=last.shape_after,
        zeros=last.zeros,
        target=latest(change.target for change in found if change.skipped is None),
        skipped=latest(change.skipped for change in found),
        skip_target=latest(change.target for change in found if change.skipped is not None),
        bits=latest(change.bits for change in found),
        loss=latest(change.loss for change in found),
    )
