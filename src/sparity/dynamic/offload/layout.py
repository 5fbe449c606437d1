"""How the memory for units is shared out: among layers, and between what is always there and what tokens used last."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparity.dynamic.offload.placement import Costs, Frequencies, by_frequency, by_programme
from sparity.dynamic.offload.slots import Slots, Staging, Units
from sparity.errors import InvalidInput

Place = Literal["frequency", "programme"]


@dataclass(frozen=True)
class Layout:
    """Of each layer the units that are always in memory and the slots for others, and the slots that all share."""

    hot: tuple[Units, ...]
    room: tuple[int, ...]
    staged: int

    @property
    def slots(self) -> int:
        """All of them."""
        return sum(map(len, self.hot)) + sum(self.room) + self.staged

    def slots_of(self, units: Sequence[int], window: int | None = None) -> list[Slots]:
        """The slots of each layer, only hot units in them: layer after layer, then the shared ones."""
        staging, found, first = Staging(self.slots - self.staged, self.staged), [], 0
        for count, hot, room in zip(units, self.hot, self.room, strict=True):
            found.append(Slots(count, hot, first, room, staging, window))
            first += len(hot) + room
        return found


def lay_out(frequencies: Frequencies, slots: int, at_once: int, share: float, costs: Costs | None = None) -> Layout:
    """Share out `slots` slots.

    Args:
        frequencies: by layer.
        slots: as many as the memory holds.
        at_once: units of a layer that must fit at once: all of its neurons, or the experts of a token.
        share: of the slots of layers that hot units get, between 0 and 1.
        costs: choose the hot ones by the programme, with these; None = by frequency.

    Raises:
        InvalidInput: there are fewer slots than a layer needs at once.
    """
    units = [len(layer) for layer in frequencies]
    needed = max((min(count, at_once) for count in units), default=0)
    if slots < needed:
        raise InvalidInput(f"there is room for {slots:,} of the {needed:,} units that a layer may need at once")

    def staged(room: Sequence[int]) -> int:
        return max((min(at_once, count - own) for count, own in zip(units, room, strict=True)), default=0)

    low, high = 0, min(slots, sum(units))  # of slots that belong to layers, the most that leaves enough to share
    while low < high:
        middle = (low + high + 1) // 2
        own = _own(frequencies, middle, share)
        low, high = (middle, high) if sum(own) + staged(own) <= slots else (low, middle - 1)
    hot, room = _parts(frequencies, low, share, costs)
    return Layout(tuple(hot), tuple(room), staged([len(h) + r for h, r in zip(hot, room, strict=True)]))


def _own(frequencies: Frequencies, total: int, share: float) -> list[int]:
    hot, room = _parts(frequencies, total, share, None)
    return [len(units) + count for units, count in zip(hot, room, strict=True)]


def _parts(frequencies: Frequencies, total: int, share: float, costs: Costs | None) -> tuple[list[Units], list[int]]:
    """Hot units and slots of each layer; slots as the units that are expected, as far as there are units for them."""
    wanted = round(total * share)
    hot = by_frequency(frequencies, wanted) if costs is None else by_programme(frequencies, wanted, costs)
    cold = [len(layer) - len(units) for layer, units in zip(frequencies, hot, strict=True)]
    expected = np.array([layer.sum() - layer[units].sum() for layer, units in zip(frequencies, hot, strict=True)])
    left, room = total - sum(map(len, hot)), np.zeros(len(cold), dtype=np.int64)
    while left > 0 and (open_ := np.flatnonzero(room < cold)).size:
        weight = expected[open_] + 1e-9
        more = np.minimum(np.floor(left * weight / weight.sum()).astype(np.int64), np.array(cold)[open_] - room[open_])
        if not more.any():
            more[: min(left, len(more))] = 1
        room[open_] += more
        left -= int(more.sum())
    return hot, room.tolist()
