"""The blocks of a Llama-shaped model as the library reads them, once it is sure that they are what it knows.

The library checks nothing: every shape, type and place of memory is checked here. What counts is the modules, which is
what the model's own code goes by, and not what the configuration says of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparity.engine.kernels import native
from sparity.engine.kernels.skip.cpu import NativeSkip
from sparity.engine.kernels.step.cpu import WIDTHS
from sparity.engine.modules.linear import DenseLinear, PackedLinear
from sparity.engine.modules.skips import output_skip_of, skip_of, skips_below
from sparity.formats import unpack

MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
OURS = ("transformers.", "sparity.")
Layer = PackedLinear | DenseLinear
SHARED = {"k": ("q",), "v": ("q", "k"), "up": ("gate",)}  # whose input a projection's is too


@dataclass(frozen=True)
class LayerSkips:
    """What is left out in one layer, where the library reads it.

    Attributes:
        skips: in front of each product, by projection; those of one input that say the same are one.
        shifts: float32 `[rows]`, the weight times the skip's centre, by projection, where there is one.
        neurons: of what the activation function gives.
    """

    skips: dict[str, NativeSkip] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    neurons: NativeSkip | None = None


def outline_declines(base: Any) -> str | None:
    """Why no model of this class and configuration has a fast path, or None; weights are not looked at."""
    config = base.config
    if reason := native.unavailable():
        return f"no compiled kernels: {reason}"
    name = type(base).__name__
    if name not in MODELS or not type(base).__module__.startswith(OURS):
        return f"{name} is none of {', '.join(MODELS)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}, not silu"
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = not kinds and getattr(config, "sliding_window", None) is not None
    if windowed or kinds - {"full_attention"}:
        return "some layers see a window of the text only"
    widths = (getattr(layer.self_attn, "head_dim", 0) for layer in base.layers if hasattr(layer, "self_attn"))
    odd = next((width for width in widths if width not in WIDTHS), None)
    return None if odd is None else f"heads of size {odd}; a multiple of 16 up to {WIDTHS[-1]} is needed"


def declines(base: Any) -> str | None:
    """Why a model without its head has no fast path, or None when it has one."""
    if reason := outline_declines(base):
        return reason
    name = type(base).__name__
    for name, module in base.named_modules():
        if not type(module).__module__.startswith(("torch.nn.", *OURS)):
            return f"{name} is a {type(module).__name__}, which is not the model's own"
    for kind, forward in forwards(base.modules()):
        if not forward.__module__.startswith(("torch.nn.", *OURS)):
            return f"{kind.__name__}.forward was replaced by one of {forward.__module__}"
    for name, module in base.layers.named_modules():
        if isinstance(module, nn.Linear | PackedLinear) and (
            not isinstance(module, Layer) or module.prepared is None or module.prepared.declined
        ):
            return f"layers.{name} is not multiplied by the compiled kernels"
    if len({(skip.tokens.first, skip.tokens.prompt) for skip in skips_below(base.layers)}) > 1:
        return "stages skip channels of different tokens"
    for name, module in base.layers.named_modules():
        skip = output_skip_of(module)
        if skip is not None and (not name.endswith(".mlp.act_fn") or skip.rule.centre is not None):
            return f"what layers.{name} gives is skipped" + (" around a centre" if skip.rule.centre is not None else "")
    dtypes = {parameter.dtype for parameter in base.parameters()}
    if dtypes != {torch.bfloat16}:
        return f"parameters in {', '.join(sorted(map(str, dtypes)))}, not all in bfloat16"
    try:
        return next(_misfits(base), None)
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        return f"its blocks are not those of {name}: {error}"


def forwards(modules: Iterable[nn.Module]) -> list[tuple[type, Any]]:
    """Every class that modules are of, or inherit from, with a `forward` of its own, and that function."""
    kinds = dict.fromkeys(kind for module in modules for kind in type(module).__mro__)
    return [(kind, vars(kind)["forward"]) for kind in kinds if "forward" in vars(kind)]


def shape_of_heads(layer: Any) -> tuple[int, int, int]:
    """Query heads, key and value heads, and their size, in one layer."""
    attention = layer.self_attn
    width = int(attention.head_dim)
    return _rows(attention.q_proj) // width, _rows(attention.k_proj) // width, width


def library_blocks(base: Any, skips: Sequence[LayerSkips]) -> Any:
    """An array of the library's blocks, for a model that `declines` gives no reason against.

    It points to the skips of each layer, which must outlive it.
    """
    return (native.DecoderBlock * len(base.layers))(*map(_block, base.layers, skips))


def skips_of(layer: Any) -> LayerSkips:
    """What skips channels of a layer."""
    outputs = output_skip_of(layer.mlp.act_fn)
    neurons = None if outputs is None else NativeSkip(outputs.rule, _rows(layer.mlp.up_proj))
    found, shifts = dict[str, NativeSkip](), dict[str, Tensor]()
    for name, projection in zip(native.PROJECTIONS, _projections(layer), strict=True):
        skip = skip_of(projection)
        if skip is not None:
            packed, rule = projection.prepared.packed, skip.rule.like(torch.empty(0, dtype=torch.bfloat16))
            before = (found[other] for other in SHARED.get(name, ()) if other in found)
            alike = next((other for other in before if other.rule.same(rule)), None)
            found[name] = alike or NativeSkip(rule, packed.shape[1])
            if rule.centre is not None:
                shifts[name] = unpack(packed).float() @ rule.centre.float()
    return LayerSkips(found, shifts, neurons)


def _misfits(base: Any) -> Iterator[str]:
    """What contradicts the rest in some layer."""
    hidden = base.norm.weight.shape[0]
    if reason := _vector(base.norm.weight, hidden):
        yield f"norm: {reason}"
    if not len(base.layers):
        yield "it has no layers"
    for index, layer in enumerate(base.layers):
        heads, kv_heads, width = shape_of_heads(layer)
        attention, mlp, wide = layer.self_attn, layer.mlp, _rows(layer.mlp.up_proj)
        if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
            yield f"layers.{index}: its activation is {type(mlp.act_fn).__name__}, not silu"
        if attention.layer_idx != index:
            yield f"layers.{index} keeps its keys and values as layer {attention.layer_idx}"
        if not kv_heads or heads != kv_heads * attention.num_key_value_groups:
            yield f"layers.{index}: {heads} query heads do not share {kv_heads} heads of keys and values"
        shapes = (
            (heads * width, hidden),
            (kv_heads * width, hidden),
            (kv_heads * width, hidden),
            (hidden, heads * width),
            (wide, hidden),
            (wide, hidden),
            (hidden, wide),
        )
        for name, projection, shape in zip(native.PROJECTIONS, _projections(layer), shapes, strict=True):
            found = projection.prepared.packed.shape
            if tuple(found) != shape:
                yield f"layers.{index}: {name} is {found[0]} x {found[1]}, not {shape[0]} x {shape[1]}"
            if reason := _vector(projection.bias, shape[0]):
                yield f"layers.{index}: the bias of {name} {reason}"
        norms = ((layer.input_layernorm, hidden), (layer.post_attention_layernorm, hidden))
        for norm, size in (*norms, *((norm, width) for norm in _head_norms(layer) if norm is not None)):
            float(norm.variance_epsilon)
            if reason := _vector(norm.weight, size):
                yield f"layers.{index}: the weight of a norm {reason}"
        if len({norm if norm is None else norm.variance_epsilon for norm in _head_norms(layer)}) > 1:
            yield f"layers.{index}: queries and keys are not normed alike"


def _vector(found: Tensor | None, size: int) -> str | None:
    """Why the library cannot read a vector of `size` numbers; there may be none."""
    if found is None or (found.shape == (size,) and found.is_contiguous() and found.device.type == "cpu"):
        return None
    return f"has the shape {list(found.shape)} on {found.device}, not [{size}] on cpu"


def _rows(projection: Layer) -> int:
    prepared = projection.prepared
    return 0 if prepared is None else prepared.packed.shape[0]


def _projections(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    heads = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (*heads, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _head_norms(layer: Any) -> list[Any]:
    return [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]


def _block(layer: Any, skips: LayerSkips) -> native.DecoderBlock:
    heads, kv_heads, width = shape_of_heads(layer)
    norms = _head_norms(layer)
    block = native.DecoderBlock(
        attention_norm=layer.input_layernorm.weight.data_ptr(),
        attention_epsilon=layer.input_layernorm.variance_epsilon,
        mlp_norm=layer.post_attention_layernorm.weight.data_ptr(),
        mlp_epsilon=layer.post_attention_layernorm.variance_epsilon,
        neuron_skip=None if skips.neurons is None else skips.neurons.address,
        attention=native.Attention(
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            scale=layer.self_attn.scaling,
            query_norm=None if norms[0] is None else norms[0].weight.data_ptr(),
            key_norm=None if norms[1] is None else norms[1].weight.data_ptr(),
            epsilon=0.0 if norms[0] is None else norms[0].variance_epsilon,
        ),
    )
    for name, projection in zip(native.PROJECTIONS, _projections(layer), strict=True):
        setattr(block, name, projection.prepared.native.address)
        setattr(block, f"{name}_bias", None if projection.bias is None else projection.bias.data_ptr())
        setattr(block, f"{name}_skip", skips.skips[name].address if name in skips.skips else None)
        setattr(block, f"{name}_shift", skips.shifts[name].data_ptr() if name in skips.shifts else None)
    return block
