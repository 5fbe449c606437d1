"""One decoding step of a Llama-shaped model on the compiled kernels: one new token for each row of a batch.

It computes what transformers' modules compute, rounded at the same places, in one call of the library for all blocks,
with a cache that is written in place; query heads share their key and value heads without repeating them. Whatever it
does not know, `unknown` and `Step.unfit` say so, and the model's own code runs.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparity.engine.decoding.cache import GrowingLayer
from sparity.engine.kernels import native
from sparity.engine.kernels.step.cpu import WIDTHS
from sparity.engine.linear import DenseLinear, PackedLinear

HARMLESS = {"past_key_values", "return_dict", "cache_position"}  # options that change nothing here
MOST_ROWS = 32  # of a batch; beyond, a product of many inputs at once is what takes the time
MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
Layer = PackedLinear | DenseLinear


def unknown(base: Any) -> str | None:
    """Why a model without its head has no fast path, or None when it has one."""
    config = base.config
    if reason := native.unavailable():
        return f"no compiled kernels: {reason}"
    name = type(base).__name__
    if name not in MODELS or not type(base).__module__.startswith(("transformers.", "sparity.")):
        return f"{name} is none of {', '.join(MODELS)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}, not silu"
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = not kinds and getattr(config, "sliding_window", None) is not None
    if windowed or kinds - {"full_attention"}:
        return "some layers see a window of the text only"
    width = _width(config)
    if width not in WIDTHS:
        return f"heads of size {width}; a multiple of 16 up to {WIDTHS[-1]} is needed"
    for name, module in base.layers.named_modules():
        if isinstance(module, nn.Linear | PackedLinear) and (
            not isinstance(module, Layer) or module.prepared is None or module.prepared.declined
        ):
            return f"layers.{name} is not multiplied by the compiled kernels"
    dtypes = {parameter.dtype for parameter in base.parameters()}
    if dtypes != {torch.bfloat16}:
        return f"parameters in {', '.join(sorted(map(str, dtypes)))}, not all in bfloat16"
    return None


class Step:
    """The blocks of one model, ready to be run for one token at a time."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self._modules = list(base.modules())
        self._parameters = list(base.parameters())
        self._addresses: list[int] = []
        self._blocks: Any = None

    def unfit(self, rows: int, layers: Sequence[GrowingLayer], options: dict[str, Any]) -> bool:
        """Whether a call must run the model's own code: options, hooks, many rows, a model or cache of another kind."""
        config = self.base.config
        return (
            rows > MOST_ROWS
            or len(layers) != len(self.base.layers)
            or self.base.norm.weight.dtype != torch.bfloat16
            or bool({name for name, value in options.items() if value is not None and value is not False} - HARMLESS)
            or bool(getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False))
            or config._attn_implementation not in ("sdpa", "eager")
            or any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)
        )

    def __call__(
        self, embeddings: Tensor, positions: Tensor, mask: Tensor | None, layers: Sequence[GrowingLayer]
    ) -> Tensor:
        """`embeddings` [batch, 1, hidden] -> the same after all blocks and the last norm; the cache grows by one.

        `positions` [batch, 1] or [1, 1]; `mask` [batch, length + 1] is 0 where a token is not seen, or None.
        """
        base, batch = self.base, len(embeddings)
        stream = embeddings[:, 0].clone(memory_format=torch.contiguous_format)  # [batch, hidden]
        out = torch.empty_like(stream)
        tables = base.rotary_emb(embeddings, position_ids=positions)
        cos, sin = (table.expand(batch, 1, -1)[:, 0].contiguous() for table in tables)
        visible = None if mask is None or bool(mask.all()) else mask.ne(0).to(torch.uint8).contiguous()
        length = layers[0].get_seq_length()
        blocks = self._current_blocks()
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

    def _current_blocks(self) -> Any:
        """The blocks as the library reads them, a copy for this call; made anew when a parameter has other memory."""
        addresses = [parameter.data_ptr() for parameter in self._parameters]
        if addresses != self._addresses:
            self._blocks = (native.Block * len(self.base.layers))(
                *(_block(layer, self.base.config) for layer in self.base.layers)
            )
            self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        return type(self._blocks).from_buffer_copy(self._blocks)

    @staticmethod
    def _lend(attention: native.Attention, layer: GrowingLayer, batch: int, length: int) -> None:
        """Tell the library where a layer's keys and values lie."""
        shape = (batch, attention.kv_heads, 1, attention.width)
        keys, values = layer.with_room(length + 1, shape, torch.bfloat16)
        attention.keys, attention.values, attention.capacity = keys.data_ptr(), values.data_ptr(), keys.shape[2]


def _block(layer: Any, config: Any) -> native.Block:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    block = native.Block(
        attention_norm=layer.input_layernorm.weight.data_ptr(),
        attention_epsilon=layer.input_layernorm.variance_epsilon,
        mlp_norm=layer.post_attention_layernorm.weight.data_ptr(),
        mlp_epsilon=layer.post_attention_layernorm.variance_epsilon,
        attention=native.Attention(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            width=_width(config),
            scale=attention.scaling,
            query_norm=None if norms[0] is None else norms[0].weight.data_ptr(),
            key_norm=None if norms[1] is None else norms[1].weight.data_ptr(),
            epsilon=0.0 if norms[0] is None else norms[0].variance_epsilon,
        ),
    )
    for name, projection in zip(
        native.PROJECTIONS, (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj), strict=True
    ):
        setattr(block, name, projection.prepared.native.address)
        setattr(block, f"{name}_bias", None if projection.bias is None else projection.bias.data_ptr())
    return block


def _width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
