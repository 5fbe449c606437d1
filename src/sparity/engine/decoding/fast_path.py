"""One decoding step of a Llama-shaped model on the compiled kernels: one new token for each row of a batch.

It computes what transformers' modules compute, rounded at the same places, in one call of the library for all blocks,
with a cache that is written in place; query heads share their key and value heads without repeating them. Whatever it
does not know, `unknown` and `Step.unfit` say so, and the model's own code runs.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparity.engine.decoding.cache import GrowingLayer
from sparity.engine.decoding.change_detector import Snapshot
from sparity.engine.decoding.llama_layout import library_blocks, shape_of_heads
from sparity.engine.kernels import native

HARMLESS = {"past_key_values", "return_dict", "cache_position"}  # options that change nothing here
MOST_ROWS = 32  # of a batch; beyond, a product of many inputs at once is what takes the time


class Step:
    """The blocks of one model that is not `unknown`, ready to be run for one token at a time."""

    def __init__(self, base: Any, made_of: Snapshot) -> None:
        self.base = base
        self._made_of = made_of
        self._blocks = library_blocks(base)
        self._heads = [shape_of_heads(layer)[1:] for layer in base.layers]  # key and value heads, and their size

    def unfit(
        self, rows: int, mask: Any, positions: Any, layers: Sequence[GrowingLayer], options: dict[str, Any]
    ) -> bool:
        """Whether a call must run the model's own code: inputs, options, hooks or a cache of another kind."""
        config, length = self.base.config, layers[0].get_seq_length() if layers else 0
        return (
            not 0 < rows <= MOST_ROWS
            or len(layers) != len(self._heads)
            or config.num_hidden_layers != len(self._heads)
            or not (mask is None or _is(mask, (rows, length + 1)))
            or not (positions is None or (_is(positions, (rows, 1), (1, 1)) and not positions.is_floating_point()))
            or any(
                not _continues(layer, (rows, heads, length, width))
                for layer, (heads, width) in zip(layers, self._heads, strict=True)
            )
            or bool({name for name, value in options.items() if value is not None and value is not False} - HARMLESS)
            or options.get("return_dict") is False
            or config.return_dict is False
            or bool(getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False))
            or any(_drops(layer.self_attn) for layer in self.base.layers)
            or config._attn_implementation not in ("sdpa", "eager")
            or self._made_of.hooked()
        )

    def __call__(
        self, embeddings: Tensor, positions: Tensor, mask: Tensor | None, layers: Sequence[GrowingLayer]
    ) -> Tensor | None:
        """`embeddings` [batch, 1, hidden] -> the same after all blocks and the last norm; the cache grows by one.

        `positions` [batch, 1] or [1, 1]; `mask` [batch, length + 1] is 0 where a token is not seen, or None. None is
        returned, and nothing was done, for embeddings or rotary tables that the library cannot read.
        """
        base, batch = self.base, len(embeddings)
        tables = base.rotary_emb(embeddings, position_ids=positions)
        turned = ((batch, 1, self._heads[0][1]), (1, 1, self._heads[0][1]))
        read = (embeddings, *tables)
        if (
            not _is(embeddings, (batch, 1, base.norm.weight.shape[0]))
            or not all(_is(table, *turned) for table in tables)
            or any(tensor.dtype != torch.bfloat16 for tensor in read)
        ):
            return None
        stream = embeddings[:, 0].clone(memory_format=torch.contiguous_format)  # [batch, hidden]
        out = torch.empty_like(stream)
        cos, sin = (table.expand(batch, 1, -1)[:, 0].contiguous() for table in tables)
        visible = None if mask is None or bool(mask.all()) else mask.ne(0).to(torch.uint8).contiguous()
        length = layers[0].get_seq_length()
        blocks = type(self._blocks).from_buffer_copy(self._blocks)  # of this call: threads may share a model
        for block, layer in zip(blocks, layers, strict=True):
            self._lend(block.attention, layer, batch, length)
        step = native.Step(
            tokens=batch,
            hidden=stream.shape[1],
            length=length,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            visible=None if visible is None else visible.data_ptr(),
            last_norm=base.norm.weight.data_ptr(),
            last_epsilon=base.norm.variance_epsilon,
            stream=stream.data_ptr(),
            out=out.data_ptr(),
        )
        if native.library().sparity_step(ctypes.byref(step), blocks, len(blocks), native.threads()):
            raise MemoryError(f"no memory for a decoding step of {batch} rows")
        for layer in layers:
            layer.show(length + 1)
        return out[:, None]

    @staticmethod
    def _lend(attention: native.Attention, layer: GrowingLayer, batch: int, length: int) -> None:
        """Tell the library where a layer's keys and values lie."""
        shape = (batch, attention.kv_heads, 1, attention.width)
        keys, values = layer.with_room(length + 1, shape, torch.bfloat16)
        attention.keys, attention.values, attention.capacity = keys.data_ptr(), values.data_ptr(), keys.shape[2]


def _is(found: Any, *shapes: tuple[int, ...]) -> bool:
    """Whether `found` is a tensor on the CPU with one of the shapes."""
    return isinstance(found, Tensor) and found.shape in shapes and found.device.type == "cpu"


def _drops(attention: Any) -> bool:
    """Whether attention leaves out a share of what it sees, at random."""
    return bool(attention.training and attention.attention_dropout)


def _continues(layer: GrowingLayer, shape: tuple[int, ...]) -> bool:
    """Whether a layer holds keys and values of a shape `[batch, kv_heads, length, width]` in bfloat16, or nothing."""
    if not layer.is_initialized or not layer.keys.numel():
        return not shape[2]
    return all(_is(held, shape) and held.dtype == torch.bfloat16 for held in (layer.keys, layer.values))
