"""A store in a few bits: all but the last tokens of each head are quantised, each once (KIVI; arXiv:2402.02750)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparity.dynamic.cache.quantised import QuantizedStates, quantize_cache, unpacked
from sparity.dynamic.cache.slots import Slots
from sparity.dynamic.cache.store import Store
from sparity.errors import InvalidInput


class QuantisedStore:
    """Keys per channel, in groups of neighbouring tokens; values per token, in groups of channels.

    A code, once made, never changes: a token that is evicted leaves its group to those that stay in it, and steps and
    minima of a group are freed with its last token.

    Args:
        keys: `[rows, heads, tokens, width]`, copied.
        values: `[rows, heads, tokens, value_width]`, copied.
        first: the place of the first of them.
        mass: whether each slot also has a number that a policy accumulates.
        bits: of a code.
        group: numbers that share a step: tokens of a channel of keys, channels of a value; no more than there are.
        residual: the last tokens of each head that stay as they are, at least.

    Raises:
        InvalidInput: widths that groups or bytes do not fill.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, first: int, mass: bool, bits: int, group: int, residual: int
    ) -> None:
        self.bits, self.group, self.residual = bits, group, residual
        self.channels = min(group, values.shape[-1])
        if values.shape[-1] % self.channels or any(states.shape[-1] * bits % 8 for states in (keys, values)):
            raise InvalidInput(
                f"heads of {keys.shape[-1]} numbers do not fill groups of {group} with {bits} bits each: choose "
                f"`group` as a divisor of {values.shape[-1]}, or more bits"
            )
        self.recent = Store(keys, values, first, mass)
        code = torch.empty(0, dtype=torch.uint8, device=keys.device)
        number = torch.empty(0, dtype=torch.int32, device=keys.device)
        steps = values.new_empty(0, values.shape[-1] // self.channels)
        buffers = {
            "keys": code.new_empty(0, keys.shape[-1] * bits // 8),
            "values": code.new_empty(0, values.shape[-1] * bits // 8),
            "scale": steps,
            "zero": steps,
            "places": number,
        } | ({"mass": self.recent.buffers["mass"][:0]} if mass else {})
        self.packed = Slots(keys.shape[0], keys.shape[1], buffers, spare=False)
        steps = keys.new_empty(0, keys.shape[-1])
        groups = {"scale": steps, "zero": steps, "count": number}  # of keys, and how many tokens are left in each
        self.groups = Slots(keys.shape[0], keys.shape[1], groups, spare=False)
        self.settled = 0

    @property
    def rows(self) -> int:
        """See `Holding`."""
        return self.recent.rows

    @property
    def heads(self) -> int:
        """See `Holding`."""
        return self.recent.heads

    @property
    def value_width(self) -> int:
        """See `Holding`."""
        return self.recent.value_width

    @property
    def lengths(self) -> Tensor:
        """See `Holding`."""
        return self.packed.lengths + self.recent.lengths

    @property
    def even(self) -> int | None:
        """See `Holding`: nothing is quantised yet, and heads hold the same number."""
        return None if bool(self.packed.lengths.any()) else self.recent.even

    @property
    def nbytes(self) -> int:
        """See `Holding`."""
        return self.packed.nbytes + self.groups.nbytes + self.recent.nbytes

    def append(self, keys: Tensor, values: Tensor, first: int) -> None:
        """See `Holding`."""
        self.recent.append(keys, values, first)

    def views(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `Holding`."""
        assert self.even is not None, "some tokens are quantised"
        return self.recent.views()

    def due(self, length: int) -> Tensor:
        """How many of each head's tokens are to be quantised, whole groups, where the text had `length` tokens."""
        slots, places = self.recent.all(), self.recent.buffers["places"].cpu()
        counts = self.recent.lengths
        heads = torch.repeat_interleave(torch.arange(len(counts)), counts)
        old = torch.bincount(heads[places[slots] < length], minlength=len(counts))
        return (old - self.residual).clamp_min(0) // self.group * self.group

    def quantise(self, counts: Tensor, length: int) -> None:
        """Quantise the first `counts` tokens of each head, whole groups, after `length` tokens of the text."""
        if not bool(counts.any()):
            return
        mine = torch.repeat_interleave(self.recent.starts - (counts.cumsum(0) - counts), counts)
        index = (mine + torch.arange(int(counts.sum()))).to(self.recent.device)
        keys = quantize_cache(self.recent.keys[index][None, None], bits=self.bits, per="channel", group=self.group)
        values = quantize_cache(self.recent.values[index][None, None], bits=self.bits, per="token", group=self.channels)
        filled = torch.full((len(index) // self.group,), self.group, dtype=torch.int32, device=index.device)
        given = {
            "keys": keys.packed[0, 0],
            "values": values.packed[0, 0],
            "scale": values.scale[0, 0],
            "zero": values.zero[0, 0],
            "places": self.recent.buffers["places"][index],
        }
        if "mass" in self.recent.buffers:
            given["mass"] = self.recent.buffers["mass"][index]
        self.packed.extend(counts, given)
        steps = {"scale": keys.scale[0, 0], "zero": keys.zero[0, 0], "count": filled}
        self.groups.extend(counts // self.group, steps)
        pairs = zip(self.recent.lengths, counts, strict=True)
        self.recent.keep([torch.arange(int(held)) >= int(gone) for held, gone in pairs])
        self.settled = length

    def segment(self, row: int, head: int, pages: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Holding`; a page is a group, and the tokens that are not quantised are read with any."""
        cut, codes = self.packed.cut(row, head), self.packed.buffers
        recent = self.recent.segment(row, head)
        scale, zero, counts = self._groups(row, head)
        group = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)  # of each slot
        slots: slice | Tensor = cut
        if pages is not None:
            chosen = torch.isin(group, pages.to(group.device)).nonzero().flatten()
            slots, group = cut.start + chosen, group[chosen]
        if not len(group):
            return recent
        keys = unpacked(codes["keys"][slots], self.bits).to(scale.dtype) * scale[group] + zero[group]
        packed, steps, minima = (codes[name][slots][None, None] for name in ("values", "scale", "zero"))
        values = QuantizedStates(packed, steps, minima, self.bits, "token", self.channels).dequantize()[0, 0]
        places = codes["places"][slots]
        return torch.cat([keys, recent[0]]), torch.cat([values, recent[1]]), torch.cat([places, recent[2]])

    def facts(self, row: int, head: int) -> tuple[Tensor, Tensor, None]:
        """Least and greatest of a head's groups, `[groups, width]`, from their minima and steps; means are unknown."""
        scale, zero, _ = self._groups(row, head)
        return zero, zero + scale * (2**self.bits - 1), None

    def ends(self, row: int, head: int) -> Tensor:
        """The slot of a head behind each of its groups, `[groups]`."""
        return self._groups(row, head)[2].cumsum(0)

    def always(self, row: int, head: int) -> int:
        """How many tokens of a head lie in no page and are read with any: those that are not quantised."""
        return int(self.recent.lengths[row * self.heads + head])

    def weights(self, row: int | None = None, head: int | None = None) -> None:
        """See `Holding`: every slot is one token."""

    def mass_of(self, row: int, head: int) -> Tensor | None:
        """See `Holding`."""
        recent = self.recent.mass_of(row, head)
        if recent is None:
            return None
        return torch.cat([self.packed.buffers["mass"][self.packed.cut(row, head)], recent])

    def set_mass(self, row: int, mass: Tensor | Sequence[Tensor]) -> None:
        """See `Holding`."""
        for head in range(self.heads):
            cut = self.packed.cut(row, head)
            many = cut.stop - cut.start
            self.packed.writable("mass")[cut] = mass[head][:many]
            self.recent.writable("mass")[self.recent.cut(row, head)] = mass[head][many:]

    def keep(self, masks: Sequence[Tensor]) -> None:
        """See `Holding`."""
        many = [int(count) for count in self.packed.lengths]
        self.recent.keep([mask[count:] for mask, count in zip(masks, many, strict=True)])
        if not any(many):
            return
        packed = [mask[:count] for mask, count in zip(masks, many, strict=True)]
        left = []
        for number, mask in enumerate(packed):
            cut = self.groups.cut(*divmod(number, self.heads))
            counts = self.groups.buffers["count"][cut]
            ends = torch.cat([mask.new_zeros(1, dtype=torch.int32), mask.cumsum(0, dtype=torch.int32)])
            bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)]).cpu()
            held = ends[bounds.long()].diff()
            self.groups.writable("count")[cut] = held.to(counts.device)
            left.append(held > 0)
        self.packed.keep(packed)
        self.groups.keep(left)

    def select_rows(self, rows: Tensor) -> None:
        """See `Holding`."""
        for slots in (self.recent, self.packed, self.groups):
            slots.select_rows(rows)

    def crop(self, length: int) -> None:
        """See `Holding`; what is quantised stays."""
        self.recent.crop(length)

    def _groups(self, row: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Steps and minima of a head's groups of keys `[groups, width]`, and how many tokens are left in each."""
        cut, of = self.groups.cut(row, head), self.groups.buffers
        return of["scale"][cut], of["zero"][cut], of["count"][cut]
