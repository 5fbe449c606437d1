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
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._held: list[Tensor | None] = [None, None]  # keys and values, where they are not `_shown`
        self._shown: int | None = None  # keys and values are so many tokens of the buffers; nobody asked for them yet
        self._stepped: CacheShape | None = None  # what the library was given the buffers for
        self._length = 0  # at the last view
        super().__init__()

    @classmethod
    def of(cls, layer: DynamicLayer) -> "GrowingLayer":
        """A layer that takes over what `layer` holds."""
        taken = cls()
        taken.__dict__.update({name: value for name, value in vars(layer).items() if name not in ("keys", "values")})
        taken._shown, taken._held = None, [layer.keys, layer.values]
        return taken

    @property
    def keys(self) -> Any:
        """`[batch, kv_heads, tokens, width]`, or None before the first."""
        return self._both()[0]

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._held = [states, self._both()[1]]

    @property
    def values(self) -> Any:
        """As `keys`."""
        return self._both()[1]

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._held = [self._both()[0], states]

    def _both(self) -> list[Tensor | None]:
        if self._shown is not None and self._buffers is not None:
            self._held = [buffer[:, :, : self._shown] for buffer in self._buffers]
            self._shown = None
        return self._held

    def get_seq_length(self, *arguments: Any, **named: Any) -> int:
        """The tokens that are held."""
        if self._shown is not None:
            return self._shown
        length: int = super().get_seq_length(*arguments, **named)
        return length

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
        if held is None or not (
            held[0].dtype == dtype
            and held[0].device == torch.device(device)
            and held[0].shape[:2] == (batch, heads)
            and (held[0].shape[3], held[1].shape[3]) == (width, value_width or width)
            and _writable(held[0], room)
            and (not length or (_begins(self.keys, held[0]) and _begins(self.values, held[1])))
        ):
            capacity = -(-(room + max(STEP, room // 2)) // STEP) * STEP
            held = (
                torch.empty(batch, heads, capacity, width, dtype=dtype, device=device),
                torch.empty(batch, heads, capacity, value_width or width, dtype=dtype, device=device),
            )
            if length:
                held[0][:, :, :length], held[1][:, :, :length] = self.keys, self.values
            self._buffers, self._stepped = held, None
        return held

    def declines(self, shape: CacheShape, length: int) -> str | None:
        """Why the library cannot go on from these tokens; see `CacheLayer`."""
        if self._shown == length and self._stepped == shape:
            return None
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
        buffers = self._buffers
        if (
            buffers is None
            or self._shown is None
            or self._stepped != shape
            or not _writable(buffers[0], length + fresh)
        ):
            buffers = self.with_room(length + fresh, (rows, heads, fresh, width), torch.bfloat16)
            self._stepped = shape
        return CacheView(*buffers, _equal_lengths(rows, heads, length))

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
        self._both()
        self._buffers = None
        return GrowingLayer.of(self)

    def show(self, length: int) -> None:
        """Let the layer hold the first `length` tokens of the buffers."""
        assert self._buffers is not None, "with_room comes first"
        keys, values = self._buffers
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._shown = length


def hold(layers: Sequence[GrowingLayer], length: int) -> None:
    """Let layers that have been shown hold the first `length` tokens of their buffers."""
    for layer in layers:
        layer._shown = length


@lru_cache(maxsize=4)
def _equal_lengths(rows: int, heads: int, length: int) -> Tensor:
    """`length` for every row and head, int64; nothing writes to it, so all layers of a step share one."""
    return torch.full((rows, heads), length)


def _writable(buffer: Tensor, tokens: int) -> bool:
    """Whether a buffer `[batch, kv_heads, capacity, width]` has room for so many tokens, and may be written to here.

    What was made in inference mode may be written only there.
    """
    return buffer.shape[2] >= tokens and (torch.is_inference_mode_enabled() or not buffer.is_inference())


def _begins(view: Tensor, buffer: Tensor) -> bool:
    """Whether `view` is the first tokens of every head in `buffer`."""
    return (
        view.data_ptr() == buffer.data_ptr() and view.stride() == buffer.stride() and view.shape[0] == buffer.shape[0]
    )


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
