"""Keys and values of one layer, of as many tokens per row and head as there are: what is evicted is really freed."""

from collections.abc import Sequence

import torch
from torch import Tensor

ROOM = 16  # tokens of room behind each head at least; beyond, a sixteenth of what it holds


class Store:
    """One buffer of slots for all rows and heads, one head after another, each with room to grow.

    A slot has a key, a value and the place of its token in the text; slots of a head lie in the order of the text.

    Args:
        keys: `[rows, heads, tokens, width]`, copied.
        values: `[rows, heads, tokens, value_width]`, copied.
        first: the place of the first of them.
        mass: whether each slot also has a number that a policy accumulates, float32, 0 at first.
    """

    def __init__(self, keys: Tensor, values: Tensor, first: int = 0, mass: bool = False) -> None:
        self.rows, self.heads = keys.shape[0], keys.shape[1]
        self.lengths = torch.zeros(self.rows * self.heads, dtype=torch.int64)  # on the CPU, as are the starts
        self.starts = torch.zeros_like(self.lengths)
        self.room = torch.zeros_like(self.lengths)
        self.keys, self.values = keys.new_empty(0, keys.shape[-1]), values.new_empty(0, values.shape[-1])
        self.places = torch.empty(0, dtype=torch.int32, device=keys.device)
        self.mass = torch.empty(0, device=keys.device) if mass else None
        self.append(keys, values, first)

    @property
    def nbytes(self) -> int:
        """Of all buffers, with the room in them."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers())

    @property
    def even(self) -> int | None:
        """How many tokens every head of every row holds, where that is one number."""
        length = int(self.lengths[0])
        return length if bool((self.lengths == length).all() and (self.room == self.room[0]).all()) else None

    def append(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Add tokens `[rows, heads, new, width]` to every head; the first of them has the place `first`."""
        new = keys.shape[2]
        locked = self.keys.is_inference() and not torch.is_inference_mode_enabled()  # written only in that mode
        if locked or bool((self.lengths + new > self.room).any()):
            self._move(self._all(), self.lengths, new)
        places = torch.arange(first, first + new, dtype=torch.int32, device=self.places.device)
        places = places.expand(self.rows, self.heads, new)
        given = (keys.detach(), values.detach(), places, torch.zeros_like(places, dtype=torch.float32))
        length = self.even
        index = (self.starts[:, None] + self.lengths[:, None] + torch.arange(new)).flatten().to(self.keys.device)
        for buffer, states in zip(self._buffers(), given, strict=False):
            if length is None:
                buffer[index] = states.reshape(-1, *buffer.shape[1:])
            else:
                self._even(buffer)[:, :, length : length + new] = states
        self.lengths = self.lengths + new

    def views(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys, values, places and mass `[rows, heads, tokens, ...]`, not copied; only of an even store."""
        length = self.even
        assert length is not None, "heads hold different numbers of tokens"
        keys, values, places, *mass = (self._even(buffer)[:, :, :length] for buffer in self._buffers())
        return keys, values, places, mass[0] if mass else None

    def segment(self, row: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and places of one head `[tokens, ...]`, not copied."""
        number = row * self.heads + head
        cut = slice(int(self.starts[number]), int(self.starts[number] + self.lengths[number]))
        return self.keys[cut], self.values[cut], self.places[cut]

    def padded(self, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Keys, values, places, mass and presence of a row's heads, `[1, heads, most tokens, ...]`, copied.

        They end together: in front of a head's first token lie copies of it that are not present.
        """
        own = slice(row * self.heads, (row + 1) * self.heads)
        lengths, starts = self.lengths[own], self.starts[own]
        most = int(lengths.max())
        slots = starts[:, None] + lengths[:, None] - most + torch.arange(most)
        present = (slots >= starts[:, None]).to(self.keys.device)
        index = slots.maximum(starts[:, None]).to(self.keys.device)
        mass = None if self.mass is None else self.mass[index][None]
        return self.keys[index][None], self.values[index][None], self.places[index][None], mass, present[None]

    def keep(self, masks: Sequence[Tensor]) -> None:
        """Keep of every head, row by row, the slots that its mask `[tokens]` names; the rest is freed."""
        slots = [start + mask.nonzero().flatten().cpu() for start, mask in zip(self.starts, masks, strict=True)]
        self._move(torch.cat(slots), torch.tensor([len(each) for each in slots]))

    def select_rows(self, rows: Tensor) -> None:
        """Hold copies of some rows, in their order; one may come several times."""
        chosen = (rows.cpu()[:, None] * self.heads + torch.arange(self.heads)).flatten()
        slots = [self.starts[number] + torch.arange(int(self.lengths[number])) for number in chosen]
        self.rows = len(rows)
        self._move(torch.cat(slots), self.lengths[chosen])

    def crop(self, length: int) -> None:
        """Hold only tokens whose place is below `length`."""
        places = self.places.cpu()
        slots = self._all()
        held = places[slots] < length
        heads = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        self._move(slots[held], torch.bincount(heads[held], minlength=len(self.lengths)))

    def set_mass(self, row: int, mass: Tensor) -> None:
        """What a policy accumulated of an even row, `[heads, tokens]`."""
        assert self.mass is not None, "the store keeps no mass"
        for head in range(self.heads):
            number = row * self.heads + head
            self.mass[int(self.starts[number]) : int(self.starts[number] + self.lengths[number])] = mass[head]

    def _even(self, buffer: Tensor) -> Tensor:
        """A buffer of an even store as `[rows, heads, room, ...]`."""
        return buffer.view(self.rows, self.heads, int(self.room[0]), *buffer.shape[1:])

    def _buffers(self) -> list[Tensor]:
        return [self.keys, self.values, self.places, *([] if self.mass is None else [self.mass])]

    def _all(self) -> Tensor:
        """The slots that are held, in their order."""
        return torch.cat([start + torch.arange(int(n)) for start, n in zip(self.starts, self.lengths, strict=True)])

    def _move(self, slots: Tensor, lengths: Tensor, new: int = 0) -> None:
        """Move slots to new buffers, `lengths` of them to each head, with room for `new` more and then some."""
        room = lengths + new + torch.clamp(lengths // 16, min=ROOM)
        starts = room.cumsum(0) - room
        targets = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths) + torch.arange(len(slots))
        device = self.keys.device
        slots, targets, total = slots.to(device), targets.to(device), int(room.sum())
        moved = []
        for buffer in self._buffers():
            fresh = buffer.new_empty(total, *buffer.shape[1:])
            fresh[targets] = buffer[slots]
            moved.append(fresh)
        self.keys, self.values, self.places = moved[:3]
        self.mass = moved[3] if self.mass is not None else None
        self.starts, self.lengths, self.room = starts, lengths, room
