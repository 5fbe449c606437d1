"""Keys and values of one layer in their own type, of as many tokens per row and head as there are."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparity.dynamic.cache.slots import Slots


class Holding(Protocol):
    """What attention and policies ask of a layer's tokens, however they are stored.

    A slot has a key, a value and the place of its token in the text; slots of a head lie in the order of the text.
    """

    @property
    def rows(self) -> int:
        """Of the batch."""

    @property
    def heads(self) -> int:
        """Of keys and values."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each head, row by row, int64 `[rows * heads]` on the CPU."""

    @property
    def nbytes(self) -> int:
        """Of all buffers, with the room in them."""

    @property
    def even(self) -> int | None:
        """How many tokens every head holds, where that is one number and `views` can show them."""

    @property
    def value_width(self) -> int:
        """Numbers of a value."""

    @property
    def settled(self) -> int:
        """Before which length of the text tokens cannot be taken back because what is held rests on them; 0 = none."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Add tokens `[rows, heads, new, width]` to every head; the first of them has the place `first`."""

    @abstractmethod
    def views(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys, values, places and mass `[rows, heads, tokens, ...]`, not copied; only of an even store."""

    @abstractmethod
    def segment(self, row: int, head: int, pages: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and places of one head `[tokens, ...]`, or of some of its pages."""

    @abstractmethod
    def weights(self, row: int | None = None, head: int | None = None) -> Tensor | None:
        """What is added to logits of slots that stand for several tokens, of all rows or one head; None = nothing."""

    @abstractmethod
    def mass_of(self, row: int, head: int) -> Tensor | None:
        """What a policy accumulated of one head, `[tokens]`."""

    @abstractmethod
    def set_mass(self, row: int, mass: Tensor | Sequence[Tensor]) -> None:
        """What a policy accumulated of a row, `[tokens]` of each head."""

    @abstractmethod
    def keep(self, masks: Sequence[Tensor]) -> None:
        """Keep of every head, row by row, the slots that its mask `[tokens]` names; the rest is freed."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Hold copies of some rows, in their order; one may come several times."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Hold only tokens whose place is below `length`."""


class Store(Slots):
    """Keys and values as they are.

    Args:
        keys: `[rows, heads, tokens, width]`, copied.
        values: `[rows, heads, tokens, value_width]`, copied.
        first: the place of the first of them.
        mass: whether each slot also has a number that a policy accumulates, float32, 0 at first.
        unit: see `Slots`.
        weighed: whether a slot may stand for several tokens; its `weight`, float32, is their number.
    """

    settled = 0

    def __init__(
        self, keys: Tensor, values: Tensor, first: int = 0, mass: bool = False, unit: int = 1, weighed: bool = False
    ) -> None:
        buffers = {
            "keys": keys.new_empty(0, keys.shape[-1]),
            "values": values.new_empty(0, values.shape[-1]),
            "places": torch.empty(0, dtype=torch.int32, device=keys.device),
        }
        number = torch.empty(0, device=keys.device)
        buffers |= ({"mass": number} if mass else {}) | ({"weight": number} if weighed else {})
        super().__init__(keys.shape[0], keys.shape[1], buffers, unit)
        self.append(keys, values, first)

    @property
    def keys(self) -> Tensor:
        """`[slots, width]`."""
        return self.buffers["keys"]

    @property
    def values(self) -> Tensor:
        """`[slots, value_width]`."""
        return self.buffers["values"]

    @property
    def value_width(self) -> int:
        """See `Holding`."""
        return self.values.shape[-1]

    def append(self, keys: Tensor, values: Tensor, first: int) -> None:
        """See `Holding`."""
        places = torch.arange(first, first + keys.shape[2], dtype=torch.int32, device=self.device)
        given = {
            "keys": keys.detach(),
            "values": values.detach(),
            "places": places.expand(self.rows, self.heads, -1),
        }
        for name, number in (("mass", 0.0), ("weight", 1.0)):
            if name in self.buffers:
                given[name] = torch.full_like(given["places"], number, dtype=torch.float32)
        self.append_even(given)

    def add(self, keys: Tensor, values: Tensor, places: Tensor, held: Tensor) -> None:
        """Add to every head of a row some tokens, wherever in the text; slots then no longer lie in its order.

        Args:
            keys: `[rows, heads, new, width]`.
            values: `[rows, heads, new, value_width]`.
            places: of the tokens, int64 `[rows, new]`.
            held: bool `[rows, new]` on the CPU, which are added.
        """
        wanted = held[:, None].expand(-1, self.heads, -1).to(self.device)
        given = {
            "keys": keys.detach()[wanted],
            "values": values.detach()[wanted],
            "places": places.to(self.device)[:, None].expand(wanted.shape)[wanted].int(),
        }
        self.extend(held.sum(1).repeat_interleave(self.heads), given)

    def in_order(self, row: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[heads, tokens, ...]` of a row whose heads hold the same tokens, in the order of the text.

        Args:
            row: of the batch.
            wanted: bool `[length]` on the CPU, which places of the text.
        """
        places = self.buffers["places"][self.cut(row, 0)].long().cpu()
        slots = wanted[places].nonzero().flatten()
        slots = slots[places[slots].argsort()]
        index = (self.starts[row * self.heads :][: self.heads, None] + slots).to(self.device)
        return self.keys[index], self.values[index]

    def views(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `Holding`."""
        length = self.even
        assert length is not None, "heads hold different numbers of tokens"
        keys, values, places = (self.evenly(name)[:, :, :length] for name in ("keys", "values", "places"))
        return keys, values, places, self.evenly("mass")[:, :, :length] if "mass" in self.buffers else None

    def weights(self, row: int | None = None, head: int | None = None) -> Tensor | None:
        """See `Holding`."""
        if "weight" not in self.buffers:
            return None
        if row is None or head is None:
            return self.evenly("weight")[:, :, : self.even].log()
        return self.buffers["weight"][self.cut(row, head)].log()

    def merge(self, masks: Sequence[Tensor], real: Tensor) -> list[Tensor]:
        """Merge what masks `[tokens]` let go of each head into its last slot of those, which then stays.

        Keys and values become their mean, weighed as the slots are.

        Args:
            masks: row by row, what stays.
            real: bool `[rows, length]`, what of each text is no padding.
        """
        found = []
        for number, mask in enumerate(masks):
            cut = self.cut(*divmod(number, self.heads))
            places = self.buffers["places"][cut].long().cpu()
            gone = (~mask & real[number // self.heads][places]).nonzero().flatten()
            if len(gone):
                slots = (cut.start + gone).to(self.device)
                weight = self.buffers["weight"][slots]
                for name in ("keys", "values"):
                    mean = (self.buffers[name][slots].float() * weight[:, None]).sum(0) / weight.sum()
                    self.buffers[name][slots[-1]] = mean.to(self.buffers[name].dtype)
                self.buffers["weight"][slots[-1]] = weight.sum()
                mask = mask.clone()
                mask[gone[-1]] = True
            found.append(mask)
        return found

    def segment(self, row: int, head: int, pages: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Holding`; not copied."""
        assert pages is None, "this store has no pages"
        cut = self.cut(row, head)
        return self.keys[cut], self.values[cut], self.buffers["places"][cut]

    def mass_of(self, row: int, head: int) -> Tensor | None:
        """See `Holding`."""
        return self.buffers["mass"][self.cut(row, head)] if "mass" in self.buffers else None

    def set_mass(self, row: int, mass: Tensor | Sequence[Tensor]) -> None:
        """See `Holding`."""
        for head in range(self.heads):
            self.buffers["mass"][self.cut(row, head)] = mass[head]

    def crop(self, length: int) -> None:
        """See `Holding`."""
        slots = self.all()
        held = self.buffers["places"].cpu()[slots] < length
        heads = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        self._move(slots[held], torch.bincount(heads[held], minlength=len(self.lengths)))


def padded(store: Holding, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Keys, values, places, mass and presence of a row's heads, `[1, heads, most tokens, ...]`, copied.

    They end together: in front of a head's first token lie copies of it that are not present.
    """
    parts = [(*store.segment(row, head), store.mass_of(row, head)) for head in range(store.heads)]
    most = max(len(part[2]) for part in parts)
    found: list[list[Tensor]] = [[], [], [], []]
    present = []
    for part in parts:
        missing = most - len(part[2])
        index = (torch.arange(most, device=part[2].device) - missing).clamp_min(0)
        present.append(torch.arange(most, device=part[2].device) >= missing)
        for each, states in zip(found, part, strict=True):
            if states is not None:
                each.append(states[index] if len(states) else states.new_zeros(most, *states.shape[1:]))
    keys, values, places, *mass = (torch.stack(each)[None] for each in found if each)
    return keys, values, places, mass[0] if mass else None, torch.stack(present)[None]
