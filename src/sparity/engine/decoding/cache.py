"""A key-value cache with room to grow: a new token is written behind the others, which stay where they are."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from sparity.engine.kernels.step.cpu import CacheView
from sparity.engine.runtime import CacheLayer, CacheShape

STEP = 64  # tokens: room is given in multiples


class GrowingLayer(DynamicLayer, CacheLayer):
    """One layer's keys and values `[batch, kv_heads, tokens, width]`, views of buffers with room behind them.

    transformers' own layer copies the whole cache for every token. All else (cropping, reordering of beams, selection)
    is its own code: whatever replaces the views is moved into new buffers at the next token.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._length = 0  # at the last view

    @classmethod
    def of(cls, layer: DynamicLayer) -> "GrowingLayer":
        """A layer that takes over what `layer` holds."""
        taken = cls()
        taken.__dict__.update(layer.__dict__)
        return taken

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values `[batch, kv_heads, new, width]`; all of them are returned."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled() or not self._takes(key_states, value_states):
            # what a gradient may pass through, also one of queries alone, must not be written over; and of other
            # shapes or types it is for transformers to say what becomes of them
            keys, values = super().update(key_states, value_states)
            return keys, values
        length, new = self.get_seq_length(), key_states.shape[-2]
        buffers = self.with_room(
            length + new, key_states.shape, key_states.dtype, value_states.shape[-1], key_states.device
        )
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, length : length + new] = states
        self.show(length + new)
        return self.keys, self.values

    def with_room(
        self,
        room: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        value_width: int | None = None,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """The buffers `[batch, kv_heads, capacity, width]` of keys and values, with room for `room` tokens.

        They hold the tokens so far. `shape` and `dtype` are those of the keys to come, `[batch, kv_heads, new, width]`;
        values may have a width of their own.
        """
        batch, heads, _, width = shape
        length = self.get_seq_length()
        held = self._buffers
        if (
            held is None
            or not (
                held[0].dtype == dtype
                and held[0].device == torch.device(device)
                and (torch.is_inference_mode_enabled() or not held[0].is_inference())  # which may be written only there
                and held[0].shape[:2] == (batch, heads)
                and (held[0].shape[3], held[1].shape[3]) == (width, value_width or width)
                and held[0].shape[2] >= room
                and (not length or (_begins(self.keys, held[0]) and _begins(self.values, held[1])))
            )
        ):
            capacity = -(-(room + max(STEP, room // 2)) // STEP) * STEP
            held = (
                torch.empty(batch, heads, capacity, width, dtype=dtype, device=device),
                torch.empty(batch, heads, capacity, value_width or width, dtype=dtype, device=device),
            )
            if length:
                held[0][:, :, :length], held[1][:, :, :length] = self.keys, self.values
            self._buffers = held
        return held

    def declines(self, shape: CacheShape, length: int) -> str | None:
        """Why the library cannot go on from these tokens; see `CacheLayer`."""
        if not self.is_initialized or not self.keys.numel():
            return None if not length else f"a layer of the cache is empty, the first one holds {length} tokens"
        wanted = (shape.rows, shape.kv_heads, length, shape.width)
        for held in (self.keys, self.values):
            if held.shape != wanted:
                return f"the cache holds {list(held.shape)}, and the model continues {list(wanted)}"
            if held.dtype != torch.bfloat16 or held.device.type != "cpu":
                return f"the cache holds {str(held.dtype).removeprefix('torch.')} on {held.device}, not bfloat16 on cpu"
        return None

    def view(self, fresh: int, shape: CacheShape) -> CacheView:
        """The buffers, with room for `fresh` tokens more; see `CacheLayer`."""
        rows, heads, width = shape
        self._length = length = self.get_seq_length()
        keys, values = self.with_room(length + fresh, (rows, heads, fresh, width), torch.bfloat16)
        return CacheView(keys, values, _equal_lengths(rows, heads, length))

    def commit(self, fresh: int) -> None:
        """Hold what was written; see `CacheLayer`."""
        self.show(self._length + fresh)

    def _takes(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether new keys and values are like those that are held, but for their number."""
        if not self.get_seq_length():
            return True
        return all(
            held.shape[:2] == new.shape[:2]
            and held.shape[3] == new.shape[3]
            and (held.dtype, held.device) == (new.dtype, new.device)
            for held, new in ((self.keys, key_states), (self.values, value_states))
        )

    def __copy__(self) -> "GrowingLayer":
        """A layer with the same tokens; whichever of the two grows moves to memory of its own."""
        self._buffers = None
        return GrowingLayer.of(self)

    def show(self, length: int) -> None:
        """Let the layer hold the first `length` tokens of the buffers."""
        assert self._buffers is not None, "with_room comes first"
        keys, values = self._buffers
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]


@lru_cache(maxsize=4)
def _equal_lengths(rows: int, heads: int, length: int) -> Tensor:
    """`length` for every row and head, int64; nothing writes to it, so all layers of a step share one."""
    return torch.full((rows, heads), length)


def _begins(view: Tensor, buffer: Tensor) -> bool:
    """Whether `view` is the first tokens of every head in `buffer`."""
    return view.data_ptr() == buffer.data_ptr() and view.stride() == buffer.stride() and len(view) == len(buffer)


def use_growing_layers(cache: Any) -> list[Any] | None:
    """Give a cache's ordinary layers room to grow, in place.

    Returns its layers, each a layer of transformers and a `CacheLayer`, or None when `declines` says why not.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer.of(layer)
    if cache.layer_class_to_replicate is DynamicLayer:  # layers that are still to come
        cache.layer_class_to_replicate = GrowingLayer
    layers: list[Any] = cache.layers
    return layers if all(isinstance(layer, CacheLayer) for layer in layers) else None


def declines(cache: Any) -> str | None:
    """Why the library does not write to a cache, or None when it does."""
    if cache is None:
        return "there is no key-value cache"
    if type(cache) is not DynamicCache:
        return f"the cache is a {type(cache).__name__}, not a DynamicCache"
    if cache.offloading:
        return "the cache is offloaded"
    kinds = sorted({type(layer).__name__ for layer in cache.layers if not isinstance(layer, CacheLayer | DynamicLayer)})
    odd = sorted({type(layer).__name__ for layer in cache.layers} - {"GrowingLayer", "DynamicLayer"})
    return f"the cache has layers of the kind {(kinds or odd)[0]}" if kinds or odd else None
