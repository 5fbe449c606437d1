"""What was chosen where, and what else could have been: the data of `tune.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparity.measure.data.plain import plain
from sparity.measure.data.report import Quality

FORMAT = 1


@dataclass(frozen=True)
class TunedUnit:
    """Projections that were decided together, and what was chosen for them.

    Attributes:
        choice: its name.
        format: of the packed matrices.
        loss: of the choice alone, in nats per token.
        cost: of the choice, in seconds or bytes.
        dense: the cost of the unit as it is.
    """

    name: str
    block: int
    role: str
    choice: str
    format: str
    loss: float
    cost: float
    dense: float


@dataclass(frozen=True)
class TunedOption:
    """A choice at all units of a role: the sum of what it loses there, and its cost as a share of the dense one."""

    role: str
    choice: str
    format: str
    loss: float
    cost: float


@dataclass(frozen=True)
class TunedPoint:
    """A choice of everything: the gain that the table predicts, the loss by the table and as it was measured."""

    gain: float
    predicted: float  # nats per token
    kl: float  # nats per token
    change: float  # of perplexity
    chosen: bool


@dataclass(frozen=True)
class Pair:
    """Two units, and the cosine of their errors."""

    first: str
    second: str
    cosine: float


@dataclass(frozen=True)
class TuneReport:
    """A search and its answer.

    Attributes:
        goal: `tokens/s`, `prefill` or `bytes`.
        limits: in words.
        how: whether each unit was measured alone (`each`) or roles and blocks (`separable`).
        calibration_tokens: predictions on which units were measured.
        text: on which the points, and the answer, were measured.
        gain: of the answer over the dense model, as it was measured; None where nothing was run.
        quality: of the answer.
        verdict: None where all limits are kept, else a sentence.
    """

    model: str
    architecture: str
    goal: str
    limits: str
    how: str
    calibration_tokens: int
    text: str
    tokens: int
    dense_perplexity: float
    choices: tuple[str, ...]
    units: tuple[TunedUnit, ...]
    options: tuple[TunedOption, ...]
    points: tuple[TunedPoint, ...]
    pairs: tuple[Pair, ...]
    gain: float | None
    quality: Quality | None
    verdict: str | None
    recipe: Mapping[str, Any]
    seconds: float
    machine: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The content of `tune.json`."""
        content: dict[str, Any] = plain({"format": FORMAT, **dataclasses.asdict(self)})
        return content

    @property
    def chosen(self) -> TunedPoint | None:
        """The point of the answer, where it is one of those that were tried."""
        return next((point for point in self.points if point.chosen), None)
