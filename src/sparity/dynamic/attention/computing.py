"""Attention of a prompt by the blocks that a layout chooses: compiled where there is a kernel, else block by block."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from sparity.dynamic.attention.layouts.base import Blocks, Layout
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.weighing import weighted
from sparity.engine.kernels.attention_blocks import cpu


@dataclass(frozen=True)
class Choice:
    """How blocks are chosen in each layer.

    Attributes:
        layout: that chooses.
        size: queries and keys in a block.
        shares: of each layer float64 `[heads]`: the layout's share in each head, and from 1 on all blocks; layouts
            without a share choose below 1. Empty = the layout's own share everywhere.
    """

    layout: Layout
    size: tuple[int, int]
    shares: Sequence[Tensor] = ()

    def __call__(self, queries: Tensor, keys: Tensor, scaling: float, layer: int) -> Tensor:
        """bool `[batch, heads, query blocks, key blocks]`, True where a block is computed; causal ones alone."""
        blocks = Blocks(queries.detach(), keys.detach(), self.size, scaling)
        if not self.shares:
            return self.layout.choose(blocks) & blocks.causal
        own = self.shares[layer].to(keys.device)
        layout: Any = self.layout
        layout = replace(layout, **{layout.share: own}) if layout.share else layout
        chosen: Tensor = (layout.choose(blocks) | (own >= 1)[:, None, None]) & blocks.causal
        return chosen


@dataclass
class Call:
    """One call of attention: `query` [rows, heads, new, width], `key` and `value` [rows, kv_heads, tokens, ...].

    Attributes:
        sight: what the queries see.
        scaling: of logits.
        named: `softcap` and `s_aux`, see `sparity.dynamic.cache.attention.attend`.
        plain: whether the queries see everything up to themselves but padding in front; None = the mask is looked at.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sight: Sight
    scaling: float
    named: dict[str, Any] = field(default_factory=dict)
    plain: bool | None = None

    def __post_init__(self) -> None:
        self.pads = (self.sight.real().cumsum(1) == 0).sum(1).tolist()  # in front of each row
        self.before = self.key.shape[2] - self.query.shape[2]

    def chosen(self, choose: Choice, layer: int) -> list[Tensor] | None:
        """Of each row what is computed, bool `[heads, query blocks, key blocks]`; None = everything."""
        if not any(self.pads):
            found = list(choose(self.query, self.key, self.scaling, layer))
        else:
            found = [
                choose(query, key, self.scaling, layer)[0]
                for query, key in (self._row(row) for row in range(len(self.pads)))
            ]
        for row, mask in enumerate(found):
            query, key = self._row(row)
            causal = Blocks(query, key, choose.size, self.scaling).causal
            if not torch.equal(mask, causal.expand(mask.shape)):
                return found
        return None

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        """The queries and keys of a row without its padding, `[1, heads, ...]`."""
        pad = self.pads[row]
        return self.query[row : row + 1, :, max(pad - self.before, 0) :], self.key[row : row + 1, :, pad:]

    def compiled(self) -> bool:
        """Whether the library computes it."""
        states = (self.query, self.key, self.value)
        if any(x.device.type != "cpu" or x.dtype != self.query.dtype for x in states):
            return False
        if torch.is_grad_enabled() and any(x.requires_grad for x in states):
            return False
        if cpu.declines(self.query.dtype, self.query.shape[-1], self.value.shape[-1]):
            return False
        return self.plain if self.plain is not None else sees_its_past(self.sight, self.pads)

    def attend(self, chosen: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """`[rows, new, heads, value_width]`, of the blocks that are chosen."""
        return self._compiled(chosen, size) if self.compiled() else self._by_hand(chosen, size)

    def _compiled(self, chosen: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        rows = -(-self.query.shape[2] // size[0]), -(-self.key.shape[2] // size[1])
        kept = torch.zeros(len(chosen), self.query.shape[1], *rows, dtype=torch.bool)
        for row, mask in enumerate(chosen):
            kept[row, :, : mask.shape[1], : mask.shape[2]] = mask
        drain = self.named.get("s_aux")
        return cpu.attend_blocks(
            self.query.detach(),
            self.key.detach(),
            self.value.detach(),
            kept,
            size,
            self.scaling,
            pads=self.pads if any(self.pads) else None,
            cap=self.named.get("softcap") or 0.0,
            drains=None if drain is None else drain.detach().float().contiguous(),
        )

    def _by_hand(self, chosen: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        query, drain, cap = self.query, self.named.get("s_aux"), self.named.get("softcap")
        group = query.shape[1] // self.key.shape[1]
        out = torch.zeros(*query.shape[:3], self.value.shape[-1], dtype=query.dtype, device=query.device)
        for row, mask in enumerate(chosen):
            skipped = max(self.pads[row] - self.before, 0)
            for head in range(query.shape[1]):
                keys, values = self.key[row, head // group], self.value[row, head // group]
                sinks = None if drain is None else drain[head].float().reshape(1, 1, 1)
                for number in range(mask.shape[1]):
                    start = skipped + number * size[0]
                    end = min(start + size[0], query.shape[2])
                    places = _places(mask[head, number], size[1], self.pads[row], self.key.shape[2])
                    bias = self.sight.bias(places, start, end, row)
                    part = query[row, head, None, start:end]
                    found = weighted(part, keys[places], values[places], bias, self.scaling, cap, sinks)
                    out[row, head, start:end] = found[0]
        return out.transpose(1, 2).contiguous()


def sees_its_past(sight: Sight, pads: Sequence[int]) -> bool:
    """Whether a mask hides from real queries the future and padding in front, and nothing else."""
    mask = sight.mask
    if mask is None:
        return True
    real = torch.arange(sight.length) >= torch.tensor(pads)[:, None]  # [rows, length]
    if mask.ndim == 2:
        return torch.equal(mask.cpu() != 0, real)
    if mask.is_floating_point() and not bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        return False
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(sight.rows, -1, -1).cpu()
    causal = torch.ones(sight.new, sight.length, dtype=torch.bool).tril(sight.length - sight.new)
    wrong = (seen != (causal & real[:, None])) & real[:, sight.length - sight.new :, None]  # [rows, new, length]
    return not bool(wrong.any())


class LastMask:
    """What was found of the mask of the last call, which all layers are given."""

    def __init__(self) -> None:
        self._last: tuple[ReferenceType[Tensor], bool] | None = None

    def sees_its_past(self, sight: Sight) -> bool:
        """See `sees_its_past`."""
        if sight.mask is None:
            return True
        if self._last is None or self._last[0]() is not sight.mask:
            pads = (sight.real().cumsum(1) == 0).sum(1).tolist()
            self._last = ref(sight.mask), sees_its_past(sight, pads)
        return self._last[1]


def _places(columns: Tensor, size: int, pad: int, tokens: int) -> Tensor:
    """Where the keys of some blocks lie, bool `[key blocks]` -> int64 `[keys]`."""
    starts = columns.nonzero() * size + pad
    places = (starts + torch.arange(size, device=columns.device)).flatten()
    return places[places < tokens]
