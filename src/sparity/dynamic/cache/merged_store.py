"""A store that shares directions of its tokens with another layer's (MiniCache; Liu et al. 2024, arXiv:2405.14366)."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from sparity.dynamic.cache.slots import Slots
from sparity.dynamic.cache.store import Store
from sparity.errors import InvalidInput

SHARED = ("keys", "values", "places")


class Directions(Slots):
    """What two layers share of their merged tokens: unit vectors of keys and values, and places in the text.

    Args:
        like: the earlier layer's store, whose types they have.
    """

    def __init__(self, like: Store) -> None:
        buffers = {name: like.buffers[name].new_empty(0, *like.buffers[name].shape[1:]) for name in SHARED}
        super().__init__(like.rows, like.heads, buffers, spare=False)
        self._chosen: tuple[Tensor, Directions] | None = None

    def selected(self, rows: Tensor) -> "Directions":
        """Those of some rows, in their order; the same for both layers, which ask one after the other."""
        if self._chosen is None or not torch.equal(self._chosen[0], rows):
            found = copy.copy(self)
            found.buffers, found._chosen = dict(self.buffers), None
            found.select_rows(rows)
            self._chosen = rows.clone(), found
        return self._chosen[1]


class MergedStore:
    """Tokens of one layer of a pair: merged ones as norms along the shared directions, all others as they are.

    Args:
        plain: the layer's tokens so far.
        directions: what it shares.
        earlier: whether it is the earlier layer of the two, whose bytes the shared ones count as.
    """

    def __init__(self, plain: Store, directions: Directions, earlier: bool) -> None:
        self.plain, self.directions, self.earlier = plain, directions, earlier
        number = torch.empty(0, device=plain.device)
        self.norms = Slots(plain.rows, plain.heads, {"keys": number, "values": number}, spare=False)
        self.judged = 0  # tokens before this place that are not merged stay as they are
        self.settled = 0

    @property
    def rows(self) -> int:
        """See `Holding`."""
        return self.plain.rows

    @property
    def heads(self) -> int:
        """See `Holding`."""
        return self.plain.heads

    @property
    def value_width(self) -> int:
        """See `Holding`."""
        return self.plain.value_width

    @property
    def lengths(self) -> Tensor:
        """See `Holding`."""
        return self.norms.lengths + self.plain.lengths

    @property
    def even(self) -> int | None:
        """See `Holding`: only while nothing is merged."""
        return None if bool(self.norms.lengths.any()) else self.plain.even

    @property
    def nbytes(self) -> int:
        """See `Holding`; what two layers share is counted once."""
        return self.plain.nbytes + self.norms.nbytes + (self.directions.nbytes if self.earlier else 0)

    def append(self, keys: Tensor, values: Tensor, first: int) -> None:
        """See `Holding`."""
        self.plain.append(keys, values, first)

    def views(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `Holding`."""
        assert self.even is not None, "some tokens are merged"
        return self.plain.views()

    def restored(self, cut: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and places of merged tokens, `[slots, ...]`, all or those of one head."""
        shared, device = self.directions.buffers, self.plain.device
        keys, values = (
            (shared[name][cut].to(device).float() * self.norms.buffers[name][cut, None]).to(shared[name].dtype)
            for name in ("keys", "values")
        )
        return keys, values, shared["places"][cut].to(device)

    def segment(self, row: int, head: int, pages: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Holding`."""
        merged, plain = self.restored(self.norms.cut(row, head)), self.plain.segment(row, head, pages)
        keys, values, places = (torch.cat(pair) for pair in zip(merged, plain, strict=True))
        order = places.argsort()
        return keys[order], values[order], places[order]

    def weights(self, row: int | None = None, head: int | None = None) -> None:
        """See `Holding`: every slot is one token."""

    def mass_of(self, row: int, head: int) -> None:
        """See `Holding`: nothing is accumulated."""

    def set_mass(self, row: int, mass: Tensor | Sequence[Tensor]) -> None:
        """See `Holding`; raises `InvalidInput`, as `keep` does."""
        raise InvalidInput("tokens of two layers are merged, which no other policy chooses from")

    def keep(self, masks: Sequence[Tensor]) -> None:
        """See `Holding`; only while nothing is merged.

        Raises:
            InvalidInput: what two layers share would go for one of them.
        """
        if bool(self.norms.lengths.any()):
            raise InvalidInput("tokens of two layers are merged: of what they share none goes for one of them")
        self.plain.keep(masks)

    def select_rows(self, rows: Tensor) -> None:
        """See `Holding`."""
        self.plain.select_rows(rows)
        self.norms.select_rows(rows)
        self.directions = self.directions.selected(rows)

    def crop(self, length: int) -> None:
        """See `Holding`; what is merged stays."""
        self.plain.crop(length)
