"""Steps of one new token in each row, one after another on one cache, with everything looked up once.

What a step costs beside the library's work counts in small models, so pointers, rotary tables and memory are prepared
for many steps. Nothing else may use the cache, and nothing may change the model, as long as steps follow each other.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from sparity.engine.decoding.cache import GrowingLayer, hold
from sparity.engine.decoding.fast_path import Step
from sparity.engine.decoding.rotary import by_length, tables
from sparity.engine.kernels import native
from sparity.engine.runtime import CacheShape

AHEAD = 64  # steps that rotary tables are made for at a time


class SingleSteps:
    """What `Step` gives for one token of each row, bit for bit, as often as it is called.

    Args:
        step: of the model; it declines nothing of the calls to come.
        layers: of the cache, which hold as many tokens as the first.
        positions: of the tokens to come first, `[rows, 1]` or `[1, 1]`.
        rows: of the batch.
        mask: `[rows, tokens]`, 0 where a token is not seen; None, and tokens beyond: seen.

    Attributes:
        reason: why there can be no step, or None.
    """

    def __init__(
        self, step: Step, layers: Sequence[GrowingLayer], positions: Tensor, rows: int, mask: Tensor | None
    ) -> None:
        self._step, self._layers, self._positions = step, layers, positions
        norm = step.base.norm
        self._length, self._room = layers[0].get_seq_length(), 0
        self._visible = None if mask is None or bool(mask.all()) else mask.ne(0).to(torch.uint8).contiguous()
        self._shapes = [CacheShape(rows, heads, width) for heads, width in step.heads]
        self._lengths = torch.full((rows, max(heads for heads, _ in step.heads)), self._length)
        self._stream = torch.empty(rows, norm.weight.shape[0], dtype=torch.bfloat16)
        self._out = torch.empty_like(self._stream)
        self._blocks = step.blocks()
        self._call = native.Step(
            rows=rows,
            tokens=rows,
            hidden=self._stream.shape[1],
            visible=None if self._visible is None else self._visible.data_ptr(),
            visible_keys=0 if self._visible is None else self._visible.shape[1],
            last_norm=norm.weight.data_ptr(),
            last_epsilon=norm.variance_epsilon,
            stream=self._stream.data_ptr(),
            out=self._out.data_ptr(),
        )
        self._tables: Sequence[tuple[Tensor, Tensor]] = ()
        self._next = 0  # of the tables
        self.reason = self._look_ahead()

    def __call__(self, embeddings: Tensor) -> Tensor:
        """`embeddings` bfloat16 `[rows, hidden]` -> the same after all blocks and the last norm, until the next call.

        Raises:
            MemoryError: there is none.
        """
        if self._next == len(self._tables):
            self._look_ahead()
        if self._length >= self._room:
            self._make_room()
        self._call.cos, self._call.sin = (table.data_ptr() for table in self._tables[self._next])
        self._stream.copy_(embeddings)
        if native.library().sparity_step(ctypes.byref(self._call), self._blocks, len(self._blocks), native.threads()):
            raise MemoryError(f"no memory for a step of {len(embeddings)} tokens")
        self._next += 1
        self._length += 1
        self._lengths.add_(1)
        hold(self._layers, self._length)
        return self._out

    def _look_ahead(self) -> str | None:
        """Make rotary tables of the next steps, each cos and sin `[rows, width]`; or say why they cannot be read."""
        rotary, rows, width = self._step.base.rotary_emb, len(self._stream), self._step.heads[0][1]
        count = 1 if by_length(rotary) else AHEAD
        found = tables(rotary, self._stream, self._positions + torch.arange(count), behind=True)
        wanted = (len(self._positions), count, width)
        if any(table.shape != wanted or table.dtype != torch.bfloat16 or table.is_meta for table in found):
            return f"rotary tables are {list(found[0].shape)} in {found[0].dtype}, not {list(wanted)} in bfloat16"
        cos, sin = (table.expand(rows, count, width).transpose(0, 1).contiguous() for table in found)
        self._tables, self._next = list(zip(cos, sin, strict=True)), 0
        self._positions = self._positions + count
        return None

    def _make_room(self) -> None:
        views = [layer.view(1, shape) for layer, shape in zip(self._layers, self._shapes, strict=True)]
        for block, view in zip(self._blocks, views, strict=True):
            view.write(block.attention.cache)
            block.attention.cache.lengths = self._lengths.data_ptr()
        for layer in self._layers:
            layer.show(self._length)
        self._room = min(view.keys.shape[2] for view in views)
