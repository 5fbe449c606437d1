"""Prefill on the processor: a panel of rows at a time is unpacked in front of PyTorch's matrix product.

No dense copy of the weight is kept: the panel is the only memory beside the weight and the result.
"""

import torch
from torch import Tensor

from sparity.engine.formats import Packed, format_of
from sparity.engine.kernels import native
from sparity.engine.kernels.gemv.reference import quantize_tokens
from sparity.engine.kernels.native_weight import NativeWeight

PANEL = 8 << 20  # bytes of unpacked weight at a time: some hundred rows, enough for a fast product


def prefill(weight: NativeWeight, x: Tensor) -> Tensor:
    """`x` bfloat16 `[tokens, columns]` -> bfloat16 `[tokens, rows]`, by PyTorch's product of the unpacked weight.

    int8 weights meet inputs quantised per token, as in `gemv.reference.gemv_int8`.
    """
    packed = weight.packed
    rows, columns = packed.shape
    stored = packed.tensors["values"].dtype
    if packed.quantized:
        x, token_scales = quantize_tokens(x)
    if packed.format not in ("bitmask", "two_of_four"):
        whole = packed.tensors["values"] if packed.format == "dense" else format_of(packed).decode(packed)
        product = _product(x, whole)
        return _scaled(product, token_scales, packed, slice(None)) if packed.quantized else product
    out = torch.empty(x.shape[0], rows, dtype=torch.bfloat16)
    step = max(64, PANEL // (columns * stored.itemsize) // 64 * 64)
    panel = torch.empty(min(step, rows), columns, dtype=stored)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        native.library().sparity_unpack(weight.address, begin, end, panel.data_ptr(), native.threads())
        product = _product(x, panel[: end - begin])
        some = slice(begin, end)
        out[:, some] = _scaled(product, token_scales, packed, some) if packed.quantized else product
    return out


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [tokens, columns] times `weight` [rows, columns], transposed; int8 gives int32."""
    if x.dtype == torch.int8:
        return torch._int_mm(x, weight.T)
    return x @ weight.T


def _scaled(product: Tensor, token_scales: Tensor, packed: Packed, rows: slice) -> Tensor:
    scales = token_scales.double()[:, None] * packed.tensors["scales"][rows].double()
    return (product * scales).to(torch.bfloat16)
