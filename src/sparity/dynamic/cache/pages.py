"""A store in pages: of each page what lets a query judge it without reading its keys (Quest; arXiv:2406.10774)."""

import torch
from torch import Tensor

from sparity.dynamic.cache.store import Store


class PagedStore(Store):
    """A store whose heads lie in pages, `[rows, kv_heads, pages, page, width]` where all hold the same number.

    Attributes:
        low: of each page the least of its keys, channel by channel, `[pages, width]`, in their type.
        high: the greatest, likewise.
        mean: the mean, likewise. Of a page that is not full, those of what it holds.

    Args:
        keys: see `Store`, as are all others but `page`.
        values: see there.
        first: see there.
        mass: see there.
        page: slots of a page.
    """

    def __init__(self, keys: Tensor, values: Tensor, first: int = 0, mass: bool = False, page: int = 16) -> None:
        self.page = page
        self.low = self.high = self.mean = keys.new_empty(0, keys.shape[-1])
        super().__init__(keys, values, first, mass, unit=page)

    @property
    def nbytes(self) -> int:
        """See `Slots.nbytes`, with what is known of the pages."""
        return super().nbytes + sum(facts.untyped_storage().nbytes() for facts in (self.low, self.high, self.mean))

    def append(self, keys: Tensor, values: Tensor, first: int) -> None:
        """See `Holding`."""
        super().append(keys, values, first)
        ends = (self.lengths - 1) // self.page  # of each head its last page
        begin, counts = self.starts // self.page, (self.lengths - keys.shape[2]) // self.page
        touched = [torch.arange(int(a + b), int(a + c) + 1) for a, b, c in zip(begin, counts, ends, strict=True)]
        self._measure(torch.cat(touched))

    def moved(self) -> None:
        """See `Slots.moved`."""
        pages = len(self.keys) // self.page
        self.low, self.high, self.mean = (self.keys.new_zeros(pages, self.keys.shape[-1]) for _ in range(3))
        self._measure(torch.arange(pages))

    def facts(self, row: int | None = None, head: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Least, greatest and mean of the pages, `[rows, kv_heads, pages, width]` of an even store, or of one head."""
        if row is None or head is None:
            assert self.even is not None, "heads hold different numbers of tokens"
            used = -(-self.even // self.page)
            shape = (self.rows, self.heads, int(self.room[0]) // self.page, -1)
            low, high, mean = (facts.view(shape)[:, :, :used] for facts in (self.low, self.high, self.mean))
        else:
            cut = self.cut(row, head)
            pages = slice(cut.start // self.page, -(-cut.stop // self.page))
            low, high, mean = (facts[pages] for facts in (self.low, self.high, self.mean))
        return low, high, mean

    def ends(self, row: int, head: int) -> Tensor:
        """The slot of a head behind each of its pages, `[pages]`."""
        length = int(self.lengths[row * self.heads + head])
        return torch.arange(self.page, length + self.page, self.page).clamp_max(length)

    def always(self, row: int, head: int) -> int:
        """How many tokens of a head lie in no page and are read with any: none."""
        return 0

    def segment(self, row: int, head: int, pages: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Holding`; pages are counted within the head and given in rising order, and their tokens are copied."""
        found = super().segment(row, head)
        if pages is None:
            return found
        slots = (pages[:, None].to(self.device) * self.page + torch.arange(self.page, device=self.device)).flatten()
        slots = slots[slots < len(found[2])]
        keys, values, places = (states[slots] for states in found)
        return keys, values, places

    def gathered(self, pages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, places of some pages of an even store, and the slots that are empty, `[rows, heads, n, ...]`.

        Args:
            pages: int64 `[rows, kv_heads, pages]`, rising.
        """
        assert self.even is not None, "heads hold different numbers of tokens"
        pages = pages.to(self.device)
        found = []
        for name in ("keys", "values", "places"):
            buffer = self.evenly(name)
            paged = buffer.view(self.rows, self.heads, -1, self.page, *buffer.shape[3:])
            index = pages[(...,) + (None,) * (paged.ndim - 3)].expand(*pages.shape, *paged.shape[3:])
            found.append(paged.gather(2, index).flatten(2, 3))
        slots = pages[..., None] * self.page + torch.arange(self.page, device=self.device)
        return found[0], found[1], found[2], (slots >= self.even).flatten(2)

    def _measure(self, pages: Tensor) -> None:
        """Find anew what is known of some pages, counted over all heads."""
        ends = torch.repeat_interleave(self.starts + self.lengths, self.room // self.page)[pages]
        slots = pages[:, None] * self.page + torch.arange(self.page)
        held = (slots < ends[:, None])[..., None].to(self.device)
        pages = pages.to(self.device)
        keys = self.keys.view(-1, self.page, self.keys.shape[-1])[pages]
        locked = self.low.is_inference() and not torch.is_inference_mode_enabled()
        if locked:
            self.low, self.high, self.mean = self.low.clone(), self.high.clone(), self.mean.clone()
        self.low[pages] = keys.masked_fill(~held, torch.inf).amin(1)
        self.high[pages] = keys.masked_fill(~held, -torch.inf).amax(1)
        total = keys.float().masked_fill(~held, 0).sum(1)
        self.mean[pages] = (total / held.sum(1).clamp_min(1)).to(keys.dtype)
