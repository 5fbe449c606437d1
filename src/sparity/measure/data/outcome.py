"""What every projection is after all stages of a run, beside what it was in the dense model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sparity.stages.change import Change

VISIBLE = 0.0005  # a smaller share is written as 0.0 %


@dataclass(frozen=True)
class Outcome:
    """One projection after every stage that had to do with it.

    Attributes:
        changes: what each of these stages did, in their order; at least one.
    """

    changes: tuple[Change, ...]

    @property
    def name(self) -> str:
        """The projection."""
        return self.changes[0].name

    @property
    def cell(self) -> tuple[int, str]:
        """Its block and role."""
        return self.changes[0].block, self.changes[0].role

    @property
    def size_before(self) -> int:
        """Weights in the dense model."""
        return self.changes[0].size_before

    @property
    def size(self) -> int:
        """Weights now."""
        return self.changes[-1].size

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """`[out, in]` in the dense model and now."""
        return self.changes[0].shape_before, self.changes[-1].shape_after

    @property
    def reshaped(self) -> bool:
        """Whether its shape is another one."""
        before, after = self.shapes
        return before != after

    @property
    def left(self) -> float:
        """Weights now, as a share of those in the dense model."""
        return self.size / self.size_before if self.size_before else 1.0

    @property
    def zeros(self) -> float:
        """The share of its weights that are zero."""
        return self.changes[-1].zeros

    @property
    def asked_for_zeros(self) -> bool:
        """Whether a stage had a target of zeros for it, be it none."""
        return any(asks_for_zeros(change) for change in self.changes)

    @property
    def skipped(self) -> float | None:
        """The share of its input channels that are skipped at run time, by the last stage that skips any."""
        return next((change.skipped for change in reversed(self.changes) if change.skipped is not None), None)

    @property
    def skip_target(self) -> float | None:
        """The share that was to be skipped, by the same stage."""
        return next((change.target for change in reversed(self.changes) if change.skipped is not None), None)

    @property
    def bits(self) -> float | None:
        """Bits per stored weight, by the last stage that changed them."""
        return next((change.bits for change in reversed(self.changes) if change.bits is not None), None)

    @property
    def needed(self) -> float:
        """How many weights a token needs: those left that are not zero, in channels that are not skipped.

        Zeros and skipped channels are taken as independent.
        """
        return self.size * (1 - self.zeros) * (1 - (self.skipped or 0.0))


@dataclass(frozen=True)
class Totals:
    """What all outcomes of a run amount to; a kind of change that is not there is None.

    Attributes:
        outcomes: one per projection.
    """

    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, changes: Iterable[Change]) -> "Totals":
        """From the changes of all stages, in their order."""
        by_name: dict[str, list[Change]] = {}
        for change in changes:
            by_name.setdefault(change.name, []).append(change)
        return cls(tuple(Outcome(tuple(found)) for found in by_name.values()))

    @property
    def zeroed(self) -> tuple[Outcome, ...]:
        """The projections that have zeros, or were to get some."""
        return tuple(each for each in self.outcomes if each.zeros > 0 or each.asked_for_zeros)

    @property
    def zeros(self) -> float | None:
        """The share of zeros over these."""
        return mean((each.zeros, each.size) for each in self.zeroed)

    @property
    def target(self) -> float | None:
        """The share of zeros that was asked for, over the projections that had a target."""
        changes = [change for each in self.outcomes for change in each.changes if asks_for_zeros(change)]
        return mean((change.target or 0.0, change.size) for change in changes)

    @property
    def has_zeros(self) -> bool:
        """Whether zeros are worth a word: some can be seen in the numbers, or some were asked for."""
        return (self.zeros or 0.0) >= VISIBLE or (self.target or 0.0) > 0

    @property
    def reshaped(self) -> tuple[Outcome, ...]:
        """The projections whose shape is another one."""
        return tuple(each for each in self.outcomes if each.reshaped)

    @property
    def skipping(self) -> tuple[Outcome, ...]:
        """The projections with channels that are skipped at run time."""
        return tuple(each for each in self.outcomes if each.skipped is not None)

    @property
    def skipped(self) -> float | None:
        """The share of the input channels of these that are skipped."""
        return mean((each.skipped or 0.0, each.shapes[1][1]) for each in self.skipping)

    @property
    def skip_target(self) -> float | None:
        """The share that was to be skipped, over those of them that had a target."""
        asked = [(each.skip_target, each.shapes[1][1]) for each in self.skipping]
        return mean((target, channels) for target, channels in asked if target is not None)

    @property
    def requantised(self) -> tuple[Outcome, ...]:
        """The projections whose stored weights have another number of bits."""
        return tuple(each for each in self.outcomes if each.bits is not None)

    @property
    def bits(self) -> float | None:
        """Bits per stored weight of these, on average."""
        return mean((each.bits or 0.0, each.size) for each in self.requantised)

    def spared(self, parameters: int) -> float:
        """The share of a dense model's parameters that a token does without: zero, cut away or skipped."""
        saved = sum(each.size_before - each.needed for each in self.outcomes)
        return saved / parameters if parameters else 0.0


def asks_for_zeros(change: Change) -> bool:
    """Whether a stage's target for a projection is a share of zeros; it may be none."""
    elsewhere = change.skipped is not None or change.bits is not None or change.shape_before != change.shape_after
    return change.target is not None and not elsewhere


def mean(values: Iterable[tuple[float, int]]) -> float | None:
    """The mean of (value, weight) pairs; None where nothing has any weight."""
    pairs = list(values)
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def mean_by_cell(
    values: Iterable[tuple[tuple[int, str], float | None, int]],
) -> dict[tuple[int, str], float]:
    """The mean by block and role of (cell, value, weight), without values that are missing or not finite."""
    cells: dict[tuple[int, str], list[tuple[float, int]]] = {}
    for cell, value, weight in values:
        if value is not None and math.isfinite(value):
            cells.setdefault(cell, []).append((value, weight))
    found = {cell: mean(pairs) for cell, pairs in cells.items()}
    return {cell: value for cell, value in found.items() if value is not None}
