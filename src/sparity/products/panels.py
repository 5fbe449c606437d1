"""Products of 16-bit and int8 matrices by way of float32, a panel of the weight at a time.

A 16-bit result is the exact sum of products, plus the rounding errors of a float32 sum, rounded once to its type: what
a product in the type itself is as well. The panel is the only memory beside the weight, the inputs and the result.
"""

import torch
from torch import Tensor

from sparity.products.choice import emulated

PANEL = 8 << 20  # bytes of a weight in float32 at a time: still in the cache, and threads meet seldom
FEWEST = 128  # rows of a panel, and its step: fewer make PyTorch's product slow
FEW = 8  # inputs up to which a product in its own type is as fast: the weight's conversion takes most of the time
TURNED = 256  # inputs up to which PyTorch is faster at the transposed product
EXACT = 1024  # columns whose sums of int8 products float32 holds exactly: 2^7 * 2^7 * 2^10 = 2^24


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [..., columns] times `weight` [rows, columns], without a gradient -> `[..., rows]`, in the faster type."""
    rows = x.reshape(-1, x.shape[-1])
    if not worthwhile(rows, weight):
        return torch.nn.functional.linear(x, weight)
    return multiply(rows, weight.T).reshape(*x.shape[:-1], len(weight))


def worthwhile(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of `x` [tokens, columns] and a weight of the same type is faster in float32."""
    enough = len(x) > FEW or x.dtype == torch.int8  # whose products are slow for a single input already
    return enough and x.device.type == "cpu" and x.dtype == weight.dtype and emulated(x.dtype)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [tokens, columns] times `weight` [columns, rows], plus `bias`, by float32 sums, rounded to `weight`'s type.

    `x` is of the same type, or already in float32.
    """
    wide, rows = x.float(), weight.shape[1]
    out = torch.empty(len(x), rows, dtype=weight.dtype)
    step = panel_rows(weight.shape[0], torch.float32.itemsize, PANEL)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        sums = _product(wide, weight[:, part].T.float())
        out[:, part] = sums if bias is None else sums.add_(bias[..., part])
    return out


def multiply_bytes(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [tokens, columns] times `weight` int8 [rows, columns] -> int32 `[tokens, rows]`, exact.

    `x` is in int8, or has been turned into float32, and then float32 sums are used.
    """
    if x.dtype == torch.int8 and not worthwhile(x, weight):
        return torch._int_mm(x, weight.T)
    sums = torch.zeros(len(x), len(weight), dtype=torch.int32)
    for inputs, panel in zip(torch.split(x.float(), EXACT, 1), torch.split(weight.float(), EXACT, 1), strict=True):
        sums += _product(inputs, panel).to(torch.int32)
    return sums


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [tokens, columns] times `weight` [rows, columns], both float32 -> `[tokens, rows]`."""
    return (weight @ x.T).T if len(x) <= TURNED else x @ weight.T


def panel_rows(columns: int, itemsize: int, nbytes: int) -> int:
    """The rows of a panel of about `nbytes`: a multiple of `FEWEST`."""
    return max(1, nbytes // (max(columns, 1) * itemsize) // FEWEST) * FEWEST
