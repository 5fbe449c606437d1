"""Slots of one layer's cache, as many for each row and head as it holds: what is evicted is really freed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ROOM = 16  # slots of room behind each head at least; beyond, a sixteenth of what it holds


class Slots:
    """Buffers over the slots of all rows and heads, one head after another, each with room to grow.

    Args:
        rows: of the batch.
        heads: of each row.
        buffers: name -> empty `[0, ...]`, what each slot has.
        unit: heads begin at multiples of so many slots, and what is not filled is 0; 1 = anywhere, with anything.
        spare: whether there is room to grow; without, all slots move whenever some are added.
    """

    def __init__(self, rows: int, heads: int, buffers: Mapping[str, Tensor], unit: int = 1, spare: bool = True) -> None:
        self.spare = spare
        self.rows, self.heads, self.unit = rows, heads, unit
        self.lengths = torch.zeros(rows * heads, dtype=torch.int64)  # on the CPU, as are the starts
        self.starts = torch.zeros_like(self.lengths)
        self.room = torch.zeros_like(self.lengths)
        self.buffers = dict(buffers)

    @property
    def nbytes(self) -> int:
        """Of all buffers, with the room in them."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers.values())

    @property
    def even(self) -> int | None:
        """How many tokens every head of every row holds, where that is one number."""
        length = int(self.lengths[0])
        return length if bool((self.lengths == length).all() and (self.room == self.room[0]).all()) else None

    @property
    def device(self) -> torch.device:
        """Of the buffers."""
        return next(iter(self.buffers.values())).device

    def extend(self, counts: Tensor, given: Mapping[str, Tensor]) -> None:
        """Add `counts` slots to each head; their contents `[sum of counts, ...]` lie one head after another."""
        self.make_room(counts)
        index = _indices(self.starts + self.lengths, counts).to(self.device)
        for name, states in given.items():
            self.buffers[name][index] = states
        self.lengths = self.lengths + counts

    def append_even(self, given: Mapping[str, Tensor]) -> None:
        """Add the same number of slots to every head, `[rows, heads, new, ...]`."""
        new = next(iter(given.values())).shape[2]
        self.make_room(torch.full_like(self.lengths, new))
        length = self.even
        if length is None:
            flat = {name: states.reshape(-1, *states.shape[3:]) for name, states in given.items()}
            self.extend(torch.full_like(self.lengths, new), flat)
            return
        for name, states in given.items():
            self.evenly(name)[:, :, length : length + new] = states
        self.lengths = self.lengths + new

    def evenly(self, name: str) -> Tensor:
        """A buffer as `[rows, heads, room, ...]`; only of even slots."""
        buffer = self.buffers[name]
        return buffer.view(self.rows, self.heads, int(self.room[0]), *buffer.shape[1:])

    def cut(self, row: int, head: int) -> slice:
        """Where the slots of one head lie."""
        number = row * self.heads + head
        return slice(int(self.starts[number]), int(self.starts[number] + self.lengths[number]))

    def keep(self, masks: Sequence[Tensor]) -> None:
        """Keep of every head, row by row, the slots that its mask `[tokens]` names; the rest is freed."""
        slots = [int(start) + mask.nonzero().flatten().cpu() for start, mask in zip(self.starts, masks, strict=True)]
        self._move(torch.cat(slots), torch.tensor([len(each) for each in slots]))

    def select_rows(self, rows: Tensor) -> None:
        """Hold copies of some rows, in their order; one may come several times."""
        chosen = (rows.cpu()[:, None] * self.heads + torch.arange(self.heads)).flatten()
        self.rows = len(rows)
        self._move(_indices(self.starts[chosen], self.lengths[chosen]), self.lengths[chosen])

    def writable(self, name: str) -> Tensor:
        """A buffer that may be written in the present mode; one of inference mode is copied outside of it."""
        if self.buffers[name].is_inference() and not torch.is_inference_mode_enabled():
            self.buffers[name] = self.buffers[name].clone()
        return self.buffers[name]

    def make_room(self, counts: Tensor) -> None:
        """See that `counts` more slots fit behind each head."""
        first = next(iter(self.buffers.values()))
        locked = first.is_inference() and not torch.is_inference_mode_enabled()  # written only in that mode
        if locked or bool((self.lengths + counts > self.room).any()):
            self._move(self.all(), self.lengths, counts)

    def all(self) -> Tensor:
        """The slots that are held, in their order."""
        return _indices(self.starts, self.lengths)

    def moved(self) -> None:
        """What is to be done when slots have moved."""

    def _move(self, slots: Tensor, lengths: Tensor, new: Tensor | int = 0) -> None:
        """Move slots to new buffers, `lengths` of them to each head, with room for `new` more and then some."""
        room = lengths + new + (torch.clamp(lengths // 16, min=ROOM) if self.spare else 0)
        room = (room + self.unit - 1) // self.unit * self.unit
        starts = room.cumsum(0) - room
        slots, targets = slots.to(self.device), _indices(starts, lengths).to(self.device)
        for name, buffer in self.buffers.items():
            shape = (int(room.sum()), *buffer.shape[1:])
            fresh = buffer.new_empty(shape) if self.unit == 1 else buffer.new_zeros(shape)
            fresh[targets] = buffer[slots]
            self.buffers[name] = fresh
        self.starts, self.lengths, self.room = starts, lengths, room
        self.moved()


def _indices(starts: Tensor, counts: Tensor) -> Tensor:
    """`counts` numbers from each of `starts` on, one after another."""
    before = counts.cumsum(0) - counts
    return torch.repeat_interleave(starts - before, counts) + torch.arange(int(counts.sum()))
