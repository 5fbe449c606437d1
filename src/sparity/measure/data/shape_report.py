"""The shape that was chosen for a model, what else could have been, and the recipe that cuts to it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparity.measure.data.plain import plain

FORMAT = 1


@dataclass(frozen=True)
class ShapeAxis:
    """A dimension that was varied.

    Attributes:
        name: the dimension.
        whole: its units now.
        sizes: that were tried.
        losses: of each the share of importance that goes.
    """

    name: str
    whole: int
    sizes: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class ShapePoint:
    """A shape, and what it is predicted to cost.

    Attributes:
        sizes: axis -> its units.
        loss: the sum over axes of the shares of importance that go.
        bytes: of the plain checkpoint, exact.
        token: seconds of decoding one; None where no speed was asked for.
        prompt: seconds of a prompt of `ShapeReport.prompt` tokens; None likewise.
    """

    sizes: Mapping[str, int]
    loss: float
    bytes: int
    token: float | None
    prompt: float | None


@dataclass(frozen=True)
class ShapeReport:
    """A search among shapes and its answer.

    Attributes:
        method: whose scores are the importance.
        limits: in words.
        prompt: tokens of the prompt whose seconds are predicted.
        axes: in the order in which the recipe cuts them.
        shapes: how many combinations the model's configuration can state.
        able: how many of them keep the limits.
        dense: the model as it is.
        answer: the shape within the limits that loses least.
        front: the shapes that no other one beats in loss and in what is limited, from the least loss on.
        recipe: the stages that cut to the answer, with the sections that were given; runs with `sparity run`.
    """

    model: str
    architecture: str
    method: str
    limits: str
    prompt: int
    axes: tuple[ShapeAxis, ...]
    shapes: int
    able: int
    dense: ShapePoint
    answer: ShapePoint
    front: tuple[ShapePoint, ...]
    recipe: Mapping[str, Any]
    machine: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        content: dict[str, Any] = plain({"format": FORMAT, **dataclasses.asdict(self)})
        return content
