"""Which units of a layer are in memory, and in which slot: those that are always there, and those of the last tokens.

A unit is what is loaded as a whole: a neuron (PowerInfer, Song et al. 2023, arXiv:2312.12456; LLM in a flash, Alizadeh
et al. 2023, arXiv:2312.11514), or an expert. Nothing here reads or holds a weight.
"""

from dataclasses import dataclass
from threading import RLock

import numpy as np
from numpy.typing import NDArray

Units = NDArray[np.int64]
NOWHERE = -1


@dataclass(frozen=True)
class Load:
    """Units `[count]` that must be read, and the slots `[count]` that they are to lie in."""

    units: Units
    slots: Units

    def __len__(self) -> int:
        return len(self.units)


class Staging:
    """Slots that all layers share: for what a layer needs at once and has no room for. Only the latest set is there."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count
        self.lock = RLock()  # of all layers' slots: one may be read ahead while another one stages
        self._owner: Slots | None = None

    def give(self, owner: "Slots", count: int) -> Units:
        """The first `count` slots, in which another layer's units may have been."""
        assert count <= self.count, "room is laid out for the largest layer"
        if self._owner is not None:
            self._owner.drop_staged()
        self._owner = owner
        return np.arange(self.first, self.first + count)


class Slots:
    """The slots of one layer: `hot` units first, which stay, then `room` slots for those that tokens used last.

    Only what is missing is loaded. It takes empty slots first, then those whose units no token has used for longest. A
    set that is larger than the layer's room drives nothing out: what finds no empty slot is staged.

    Attributes:
        slot_of: int32 `[units]`, -1 = not in memory.
        window: units that the last `window` tokens did not use are let go of, as in LLM in a flash; None = they stay
            while nothing else needs their slot.
    """

    def __init__(
        self, units: int, hot: Units, first: int, room: int, staging: Staging, window: int | None = None
    ) -> None:
        self.units, self.hot, self.window = units, hot, window
        self.slot_of = np.full(units, NOWHERE, dtype=np.int32)
        self.slot_of[hot] = first + np.arange(len(hot))
        self.begin, self._first, self._room = first, first + len(hot), room
        self._unit_at = np.full(room, NOWHERE, dtype=np.int64)
        self._used = np.zeros(room, dtype=np.int64)
        self._ahead = np.zeros(room, dtype=bool)
        self._staging, self._staged = staging, np.empty(0, dtype=np.int64)
        self._step = 0

    @property
    def hot_range(self) -> tuple[int, int]:
        """The slots of the hot units, from and to, which lie there in the order of their numbers."""
        return self.begin, self._first

    @property
    def held(self) -> Units:
        """The units that are in memory, rising."""
        return np.flatnonzero(self.slot_of != NOWHERE)

    def take(self, units: Units) -> tuple[Load, int]:
        """What must be read so that all of `units` (rising) are in memory, and how many of them had been read ahead.

        It counts as the next token. All of them have slots afterwards, until the next call.
        """
        with self._staging.lock:
            return self._take(units)

    def _take(self, units: Units) -> tuple[Load, int]:
        self._step += 1
        self.drop_staged()
        if self.window is not None:
            self._let_go(np.flatnonzero((self._unit_at != NOWHERE) & (self._used < self._step - self.window)))
        found = self.slot_of[units]
        own = found[found != NOWHERE] - self._first
        own = own[own >= 0]
        self._used[own] = self._step
        ahead = int(self._ahead[own].sum())
        self._ahead[own] = False
        return self._place(units[found == NOWHERE], own), ahead

    def ahead(self, units: Units) -> Load:
        """What may be read now because `units` (rising) are expected at the next `take`: at most what finds room."""
        with self._staging.lock:
            self.drop_staged()
            found = self.slot_of[units]
            own = found[found != NOWHERE] - self._first
            missing = units[found == NOWHERE]
            places = self._free(own[own >= 0])[: len(missing)]
            load = self._fill(missing[: len(places)], places)
            self._ahead[places] = True
            return load

    def forget(self, load: Load) -> None:
        """What could not be read is not in memory."""
        with self._staging.lock:
            own = load.slots - self._first
            self._let_go(own[(own >= 0) & (own < self._room)])
            self.slot_of[load.units] = NOWHERE

    def drop_staged(self) -> None:
        """Staged units are not in memory any more."""
        self.slot_of[self._staged] = NOWHERE
        self._staged = self._staged[:0]

    def _place(self, missing: Units, own: Units) -> Load:
        slots = self._free(own)
        if len(missing) > len(slots):
            slots = slots[self._unit_at[slots] == NOWHERE]
        load = self._fill(missing[: len(slots)], slots[: len(missing)])
        rest = missing[len(load) :]
        if not len(rest):
            return load
        staged = self._staging.give(self, len(rest))
        self.slot_of[rest], self._staged = staged, rest
        return Load(missing, np.concatenate([load.slots, staged]))

    def _free(self, own: Units) -> Units:
        """Places that may be filled, the best first: empty ones, then the longest unused; not those of `own`."""
        order = np.where(self._unit_at == NOWHERE, NOWHERE, self._used)
        order[own] = np.iinfo(np.int64).max
        return np.argsort(order, kind="stable")[: self._room - len(own)]

    def _fill(self, units: Units, places: Units) -> Load:
        self._let_go(places)
        self._unit_at[places], self._used[places] = units, self._step
        self.slot_of[units] = places + self._first
        return Load(units, places + self._first)

    def _let_go(self, places: Units) -> None:
        gone = self._unit_at[places]
        self.slot_of[gone[gone != NOWHERE]] = NOWHERE
        self._unit_at[places], self._ahead[places] = NOWHERE, False
