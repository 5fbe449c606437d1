"""A step of a Llama-shaped model on the compiled kernels: the next tokens of each row of a batch.

It computes what transformers' modules compute, rounded at the same places, in one call of the library for all blocks,
with a cache that is written in place; query heads share their key and value heads without repeating them. One token of
each row is decoding; several are a short prompt, or the check of a draft. Whatever it does not know, `declines` says
so, here and in `llama_layout`, and the model's own code runs.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparity.engine.decoding.change_detector import Snapshot
from sparity.engine.decoding.llama_layout import library_blocks, shape_of_heads, skips_of
from sparity.engine.decoding.rotary import tables as rotary_tables
from sparity.engine.kernels import native
from sparity.engine.kernels.step.cpu import CacheView
from sparity.engine.modules.skips import SparseTokens, skips_below
from sparity.engine.runtime import CacheLayer, CacheShape

HARMLESS = {"past_key_values", "return_dict", "cache_position"}  # options that change nothing here
MOST_TOKENS = 32  # of all rows; beyond, a product of many inputs at once is what takes the time


class Step:
    """The blocks of one model that `llama_layout.declines` takes, ready to be run for a few tokens at a time."""

    def __init__(self, base: Any, made_of: Snapshot) -> None:
        self.base = base
        self._made_of = made_of
        self._skips = [skips_of(layer) for layer in base.layers]
        self._tokens = next((skip.tokens for skip in skips_below(base.layers)), None)
        self._blocks = library_blocks(base, self._skips)
        self._heads = [shape_of_heads(layer)[1:] for layer in base.layers]  # key and value heads, and their size
        self._known_shapes: dict[int, list[CacheShape]] = {}  # by rows

    def declines(
        self,
        rows: int,
        fresh: int,
        mask: Any,
        positions: Any,
        layers: Sequence[CacheLayer],
        length: int,
        options: dict[str, Any],
    ) -> str | None:
        """Why a call must run the model's own code (inputs, options, hooks, another cache), or None.

        Args:
            rows: of the batch.
            fresh: new tokens of each.
            mask: of the call, as are `positions` and `options`, whatever they are.
            layers: of the cache.
            length: tokens that the cache holds.
        """
        base, config = self.base, self.base.config
        if not rows or not fresh or rows * fresh > MOST_TOKENS:
            return f"{rows} x {fresh} new tokens; the fast path takes 1 to {MOST_TOKENS}"
        if len(layers) != len(self._heads) or config.num_hidden_layers != len(self._heads):
            return f"the cache has {len(layers)} layers, the configuration {config.num_hidden_layers}"
        if not (mask is None or _is(mask, (rows, length + fresh))):
            return f"the attention mask is {_shown(mask)}, not [{rows}, {length + fresh}]"
        shapes = (rows, fresh), (1, fresh)
        if not (positions is None or (_is(positions, *shapes) and not positions.is_floating_point())):
            return f"positions are {_shown(positions)}, not whole numbers [{rows}, {fresh}]"
        for layer, shape in zip(layers, self._shapes(rows), strict=True):
            if reason := layer.declines(shape, length):
                return reason
        asked = {name for name, value in options.items() if value is not None and value is not False} - HARMLESS
        if asked:
            return f"the call asks for {', '.join(sorted(asked))}"
        if options.get("return_dict") is False or config.return_dict is False:
            return "the call asks for a tuple"
        if getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False):
            return "the configuration asks for attentions or hidden states"
        if any(_drops(layer.self_attn) for layer in base.layers):
            return "attention drops some of what it sees, at random: the model is in training mode"
        if fresh > 1 and not (getattr(config, "is_causal", True) and all(_causal(layer) for layer in base.layers)):
            return "attention is not causal"
        if config._attn_implementation not in ("sdpa", "eager"):
            return f"attention is {config._attn_implementation}, not sdpa or eager"
        return "modules have hooks, or another forward" if self._made_of.hooked() else None

    def __call__(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        layers: Sequence[CacheLayer],
        length: int,
    ) -> Tensor | str:
        """`embeddings` [batch, new, hidden] -> the same after all blocks and the last norm; the cache grows by `new`.

        `positions` [batch, new] or [1, new]; `mask` [batch, length + new] is 0 where a token is not seen, or None;
        `length` tokens are in the cache. A sentence is returned, and nothing was done, for embeddings or rotary tables
        that the library cannot read.
        """
        base, (batch, fresh) = self.base, embeddings.shape[:2]
        tables = rotary_tables(base.rotary_emb, embeddings, positions, behind=length > 0)
        hidden, width = base.norm.weight.shape[0], self._heads[0][1]
        turned = ((batch, fresh, width), (1, fresh, width))
        if not _is(embeddings, (batch, fresh, hidden)):
            return f"embeddings are {_shown(embeddings)}, not [{batch}, {fresh}, {hidden}] on cpu"
        if not all(_is(table, *turned) for table in tables):
            return f"rotary tables are {_shown(tables[0])}, not [{batch}, {fresh}, {width}] on cpu"
        if any(tensor.dtype != torch.bfloat16 for tensor in (embeddings, *tables)):
            return "embeddings or rotary tables are not in bfloat16"
        tokens = batch * fresh
        cos, sin = (table.expand(batch, fresh, width).reshape(tokens, width).contiguous() for table in tables)
        visible = None if mask is None or bool(mask.all()) else mask.ne(0).to(torch.uint8).contiguous()
        views = [layer.view(fresh, shape) for layer, shape in zip(layers, self._shapes(batch), strict=True)]
        sparse = None if self._tokens is None else self._tokens.between(length, fresh)
        out = self.advance(
            embeddings.reshape(tokens, hidden),
            (cos, sin),
            torch.full((batch,), fresh),
            views,
            visible=visible,
            sparse=None if sparse is None else sparse.reshape(tokens),
        )
        for layer in layers:
            layer.commit(fresh)
        return out.view(batch, fresh, hidden)

    def blocks(self) -> Any:
        """The library's array of blocks, whose caches are still to be said: a copy, as threads may share a model."""
        return type(self._blocks).from_buffer_copy(self._blocks)

    @property
    def heads(self) -> Sequence[tuple[int, int]]:
        """Of each layer the number of key and value heads, and their size."""
        return self._heads

    @property
    def skipped(self) -> SparseTokens | None:
        """What says of which tokens channels are skipped, where they are."""
        return self._tokens

    def advance(
        self,
        embeddings: Tensor,
        tables: tuple[Tensor, Tensor],
        fresh: Tensor,
        views: Sequence[CacheView],
        visible: Tensor | None = None,
        sparse: Tensor | None = None,
    ) -> Tensor:
        """New tokens of rows of unlike lengths -> their hidden states `[tokens, hidden]` after the last norm.

        What a token gives is the same bits whatever other tokens and rows come with it. Nothing is checked.

        Args:
            embeddings: bfloat16 `[tokens, hidden]`, of all rows, row by row; they stay as they are.
            tables: cos and sin `[tokens, width]`, bfloat16, contiguous.
            fresh: how many tokens each row has, int64 `[rows]`, 0 among them.
            views: of each layer, where the keys and values of the rows are and go; the lengths stay what they were.
            visible: uint8 `[rows, keys]`, 0 for what no token of the row sees; None: all is seen.
            sparse: bool `[tokens]`, where channels are skipped; None: in all, if the model skips any.

        Raises:
            MemoryError: there is none for a step of so many tokens.
        """
        tokens, hidden = embeddings.shape
        stream = embeddings.clone(memory_format=torch.contiguous_format)
        out = torch.empty_like(stream)
        blocks = self.blocks()
        for block, view in zip(blocks, views, strict=True):
            view.write(block.attention.cache)
        several = fresh if bool((fresh != 1).any()) else None
        whole = None if sparse is None else (~sparse).to(torch.uint8).contiguous()
        step = native.Step(
            rows=len(fresh),
            tokens=tokens,
            hidden=hidden,
            fresh=None if several is None else several.data_ptr(),
            cos=tables[0].data_ptr(),
            sin=tables[1].data_ptr(),
            visible=None if visible is None else visible.data_ptr(),
            visible_keys=0 if visible is None else visible.shape[1],
            last_norm=self.base.norm.weight.data_ptr(),
            last_epsilon=self.base.norm.variance_epsilon,
            whole=None if whole is None else whole.data_ptr(),
            stream=stream.data_ptr(),
            out=out.data_ptr(),
        )
        if native.library().sparity_step(ctypes.byref(step), blocks, len(blocks), native.threads()):
            raise MemoryError(f"no memory for a step of {tokens} tokens")
        return out

    def _shapes(self, rows: int) -> list[CacheShape]:
        """What each layer of the cache is asked for."""
        if rows not in self._known_shapes:
            self._known_shapes[rows] = [CacheShape(rows, heads, width) for heads, width in self._heads]
        return self._known_shapes[rows]


def _is(found: Any, *shapes: tuple[int, ...]) -> bool:
    """Whether `found` is a tensor on the CPU with one of the shapes."""
    return isinstance(found, Tensor) and found.shape in shapes and found.device.type == "cpu"


def _shown(found: Any) -> str:
    """What `found` is, in a sentence."""
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}"
    return f"{list(found.shape)} in {str(found.dtype).removeprefix('torch.')} on {found.device}"


def _drops(attention: Any) -> bool:
    """Whether attention leaves out a share of what it sees, at random."""
    return bool(attention.training and attention.attention_dropout)


def _causal(layer: Any) -> bool:
    return bool(getattr(layer.self_attn, "is_causal", True))
