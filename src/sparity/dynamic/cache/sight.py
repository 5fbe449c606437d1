"""Which places of a text new queries see."""

import torch
from torch import Tensor

from sparity.errors import UnsupportedModel


class Sight:
    """Which places of the text the new queries of a call see, from the mask that transformers made for all of them.

    Args:
        mask: None (causal), `[rows, tokens]` (0 = padding), or `[rows or 1, 1, new, tokens]`, bool or added to logits.
        rows: of the batch.
        new: queries of each.
        length: tokens of the text, the new ones included.
        window: how many tokens back a query sees at most; None = all.

    Raises:
        UnsupportedModel: a mask of another shape.
    """

    def __init__(self, mask: Tensor | None, rows: int, new: int, length: int, window: int | None = None) -> None:
        self.rows, self.new, self.length, self.window = rows, new, length, window
        if mask is not None and not (
            (mask.ndim == 2 and mask.shape == (rows, length))
            or (
                mask.ndim == 4 and mask.shape[0] in (1, rows) and mask.shape[1] == 1 and mask.shape[2:] == (new, length)
            )
        ):
            raise UnsupportedModel(
                f"attention masks must be [rows, tokens] or [rows, 1, new, tokens] where tokens were evicted, got "
                f"{list(mask.shape)} for {rows} rows, {new} new of {length} tokens"
            )
        self.mask = mask

    @property
    def everything(self) -> bool:
        """Whether the last query sees every token of the text."""
        return self.mask is None and (self.window is None or self.length <= self.window)

    def real(self) -> Tensor:
        """bool `[rows, length]` on the CPU: tokens that are no padding, as the last query sees it."""
        if self.mask is None:
            return torch.ones(self.rows, self.length, dtype=torch.bool)
        if self.mask.ndim == 2:
            return self.mask.cpu() != 0
        last = self.mask[:, 0, -1, : self.length]
        seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        return seen.expand(self.rows, -1).cpu()

    def check_causal(self, real: Tensor) -> None:
        """Refuse a mask by which tokens do not see all `real` ones, bool `[rows, length]`, up to themselves.

        Raises:
            UnsupportedModel: it is such a mask.
        """
        if self.mask is None or self.mask.ndim == 2:
            return
        mask, places = self.mask[:, 0].expand(self.rows, -1, -1).cpu(), torch.arange(self.length)
        expected = real[:, None] & (places <= places[self.length - self.new :, None])
        if mask.is_floating_point():
            plain = torch.where(expected, mask == 0, mask <= torch.finfo(mask.dtype).min / 2)
        else:
            plain = (mask != 0) == expected
        if not bool(plain[real[:, self.length - self.new :]].all()):
            raise UnsupportedModel(
                "the attention mask says more than what is padding, and tokens that are computed later would not heed "
                "it: take a policy that revives none"
            )

    def bias(self, places: Tensor, first: int, last: int, row: int | None = None) -> Tensor | None:
        """What is added to logits of the queries `first` to `last - 1`, float32 `[..., last - first, slots]`, or None.

        Args:
            places: `[..., slots]` of slots; with `row`, of one row's, else `[rows, heads, slots]`.
            first: query.
            last: query after the last.
            row: of the batch.
        """
        own = torch.arange(self.length - self.new + first, self.length - self.new + last, device=places.device)
        if self.mask is None and last - first == 1 and last == self.new and self.everything:
            return None
        places = places.long()[..., None, :]
        visible = places <= own[:, None]
        if self.window is not None:
            visible = visible & (places > own[:, None] - self.window)
        bias = torch.zeros(visible.shape, device=places.device).masked_fill(~visible, -torch.inf)
        if self.mask is None:
            return bias
        table = self._table(first, last, row)  # [rows or 1, 1, queries, length], or without rows
        index = places.expand(*visible.shape)
        table = table.expand(*visible.shape[:-2], *table.shape[-2:]).expand(*visible.shape[:-1], table.shape[-1])
        return bias + table.gather(-1, index)

    def _table(self, first: int, last: int, row: int | None) -> Tensor:
        assert self.mask is not None
        mask = self.mask[:, None, None] if self.mask.ndim == 2 else self.mask[:, :, first:last]
        mask = mask.expand(self.rows, -1, -1, -1)
        mask = mask if row is None else mask[row, 0]
        if not mask.is_floating_point():
            return torch.zeros(mask.shape, device=mask.device).masked_fill(mask == 0, -torch.inf)
        return mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
