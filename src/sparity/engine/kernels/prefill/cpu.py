"""Prefill on the processor: a panel of rows at a time is unpacked in front of PyTorch's matrix product.

No dense copy of the weight is kept: the panel is the only memory beside the weight and the result.
"""

from itertools import product

import torch
from torch import Tensor

from sparity.engine.kernels import native
from sparity.engine.kernels.native_weight import NativeWeight
from sparity.formats import format_of
from sparity.products.panels import linear, multiply, multiply_bytes, panel_rows, worthwhile

UNPACKS = frozenset(  # (format, encoding): panel by panel
    {
        *product(("bitmask", "two_of_four"), ("same", "int8")),
        *product(("dense", "bitmask", "two_of_four", "columns"), ("int4",)),
    }
)
PANEL = 3 << 20  # bytes of unpacked weight at a time: still in the cache


def prefill(weight: NativeWeight, x: Tensor) -> Tensor:
    """`x` bfloat16 `[tokens, columns]` -> bfloat16 `[tokens, rows]`, by PyTorch's product of the unpacked weight.

    int8 weights meet inputs quantised per token, as in `gemv.reference.gemv_int8`; exact sums are scaled in float32.
    int4 weights are unpacked to bfloat16 and meet the inputs as they are.
    Where the processor has no products of the weight's type, a panel is turned into float32, and sums are rounded once.
    """
    packed = weight.packed
    rows, columns = packed.shape
    stored = torch.bfloat16 if packed.encoding.half_bytes else packed.tensors["values"].dtype
    if packed.encoding.integer_products:
        x, token_scales = _quantize(x)
    if packed.pair not in UNPACKS:
        if packed.format == "dense":
            whole = packed.tensors["values"]
        elif format_of(packed).by_channel:
            whole = packed.tensors["values"].T  # a view: there is no copy of the weight
        else:
            whole = format_of(packed).decode(packed)
        if not packed.encoding.integer_products:
            return linear(x, whole)
        return _scaled(multiply_bytes(x, whole), token_scales, packed.tensors["scales"]).to(torch.bfloat16)
    out = torch.empty(x.shape[0], rows, dtype=torch.bfloat16)
    step = panel_rows(columns, stored.itemsize, PANEL)
    panel = torch.empty(min(step, rows), columns, dtype=stored)
    widened = worthwhile(x, panel)
    if widened:
        x = x.float()
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        native.library().sparity_unpack(weight.address, begin, end, panel.data_ptr(), native.threads())
        rows_of_panel = panel[: end - begin]
        if packed.encoding.integer_products:
            sums = multiply_bytes(x, rows_of_panel)
            out[:, begin:end] = _scaled(sums, token_scales, packed.tensors["scales"][begin:end])
        elif widened:
            out[:, begin:end] = multiply(x, rows_of_panel.T)
        else:
            torch.mm(x, rows_of_panel.T, out=out[:, begin:end])
    return out


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`gemv.reference.quantize_tokens`, compiled."""
    x = x.contiguous()
    values, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    native.library().sparity_quantize(x.data_ptr(), *x.shape, values.data_ptr(), scales.data_ptr(), native.threads())
    return values, scales


def _scaled(sums: Tensor, token_scales: Tensor, row_scales: Tensor) -> Tensor:
    return sums.float().mul_(row_scales).mul_(token_scales[:, None])
