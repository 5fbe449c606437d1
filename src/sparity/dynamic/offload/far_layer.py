"""A layer whose units are on disk: what a call needs is brought into its slots."""

from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from sparity.dynamic.offload.arena import Arena
from sparity.dynamic.offload.reading import Counts, Reader
from sparity.dynamic.offload.slots import NOWHERE, Load, Slots, Units

ENOUGH = 256  # units read ahead, by which it is judged whether that is worth it


class FarLayer:
    """One MLP's units: which are in memory, where, and how the others come there.

    Attributes:
        slots: which are in memory.
        arena: the memory, of all layers.
        counts: what tokens needed and what was read, of all layers.
    """

    def __init__(self, slots: Slots, arena: Arena, reader: Reader, counts: Counts) -> None:
        self.slots, self.arena, self.counts = slots, arena, counts
        self._reader = reader
        self._coming: Future[None] | None = None
        self._ahead = self._ahead_used = 0

    def fill_hot(self) -> None:
        """Read the units that are always in memory."""
        begin, end = self.slots.hot_range
        self._reader.read(Load(self.slots.hot, begin + torch.arange(end - begin).numpy()), self.arena)

    def take(self, units: Tensor) -> Tensor:
        """The slots, int32 `[count]`, of the units of the next token or tokens, rising; what is missing is read.

        Raises:
            CorruptFile, SparityError: it cannot be read.
        """
        self.wait()
        wanted = units.numpy()
        load, ahead = self.slots.take(wanted)
        self._read(load)
        self.counts.asked += len(wanted)
        self.counts.missed += len(load)
        self.counts.ahead_used += ahead
        self._ahead_used += ahead
        return self._slots_of(wanted)

    def here(self, units: Tensor) -> Tensor:
        """The slots of units that the same tokens have taken before; others are read too."""
        wanted = units.numpy()
        found = self._slots_of(wanted)
        return self.take(units) if bool((found == NOWHERE).any()) else found

    def ahead(self, units: Units) -> None:
        """Read units that the next token of this layer is expected to need, as far as there is room.

        Where fewer than half of what was read ahead so far was needed, nothing more is.
        """
        if self._ahead >= ENOUGH and 2 * self._ahead_used < self._ahead:
            return
        load = self.slots.ahead(units)
        self._read(load)
        self.counts.ahead += len(load)
        self._ahead += len(load)

    def expect(self, coming: "Future[None]") -> None:
        """The next `take` waits for what is read ahead."""
        self._coming = coming

    def wait(self) -> None:
        """Until what is read ahead is there; what went wrong with it will go wrong again where it matters."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.exception()

    def close(self) -> None:
        """No more reads."""
        self.wait()
        self._reader.close()

    @property
    def words(self) -> str:
        """How much of it is in memory at least, for `print(model)`."""
        begin, end = self.slots.hot_range
        return f"on disk, {end - begin:,} of {self.slots.units:,} units always in memory"

    def _read(self, load: Load) -> None:
        try:
            self._reader.read(load, self.arena)
        except BaseException:
            self.slots.forget(load)
            raise

    def _slots_of(self, wanted: Any) -> Tensor:
        return torch.from_numpy(self.slots.slot_of[wanted])
