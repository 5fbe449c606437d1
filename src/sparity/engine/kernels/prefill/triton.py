"""Prefill of `bitmask` on a GPU: a panel of rows at a time is unpacked by Triton in front of PyTorch's product.

No dense copy of the weight is kept: the panel is the only memory beside the weight and the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparity.engine.kernels.bitmask_expand import expand
from sparity.engine.kernels.triton_weight import TritonWeight
from sparity.formats.storage.tiles import ROWS

PANEL = 16 << 20  # bytes of unpacked weight at a time: they stay in the L2 cache, and the product has rows enough
PLACES = 8  # groups of a tile that one program unpacks


def prefill(weight: TritonWeight, x: Tensor) -> Tensor:
    """`x` [tokens, columns] in the weight's type -> `[tokens, rows]`, by PyTorch's product of the unpacked weight.

    int8 weights are unpacked as `value * scale`, multiplied in float32 and rounded to the weight's type.

    Raises:
        InvalidInput: shapes or types that do not fit.
    """
    weight.check_inputs(x)
    rows, columns = weight.shape
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    step = max(64, PANEL // (columns * x.element_size()) // 64 * 64)
    panel = torch.empty(min(step, rows), columns, dtype=x.dtype, device=x.device)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        torch.mm(x, unpack(weight, begin, panel[: end - begin]).T, out=out[:, begin:end])
    return out


def unpack(weight: TritonWeight, begin: int, out: Tensor) -> Tensor:
    """Rows `begin` (a multiple of 4) and following of the weight into `out` [some rows, columns]; returns `out`."""
    count, columns = out.shape
    groups = weight.part["masks"].shape[1]
    parts = (weight.part[name] for name in ("masks", "starts", "offsets", "values", "scales"))
    grid = (-(-count // ROWS), -(-groups // PLACES))
    _unpack[grid](*parts, out, begin // ROWS, count, columns, groups, PLACES, weight.quantized)
    return out


@triton.jit
def _unpack(
    masks,
    starts,
    offsets,
    values,
    scales,
    out,  # [count, columns]
    first_tile,
    count,
    columns,
    groups,
    P: tl.constexpr,
    SCALED: tl.constexpr,
):
    tile = first_tile + tl.program_id(0)
    byte = tl.arange(0, 32)
    group = tl.program_id(1) * P + tl.arange(0, P)
    inside = group < groups
    begin = tile.to(tl.int64) * groups
    start = tl.load(starts + begin + group, mask=inside, other=0)
    mask = tl.load(masks + begin * 32 + group[:, None] * 32 + byte[None, :], mask=inside[:, None], other=0)
    weights = expand(values + tl.load(offsets + tile), mask, start)
    row = tl.program_id(0) * 4 + byte // 8  # of `out`
    if SCALED:
        scale = tl.load(scales + first_tile * 4 + row, mask=row < count, other=0)
        weights = weights.to(tl.float32) * scale[None, :, None]
    column = group[:, None, None] * 64 + (byte % 8 * 8)[None, :, None] + tl.arange(0, 8)[None, None, :]
    at = row.to(tl.int64)[None, :, None] * columns + column
    tl.store(out + at, weights.to(out.dtype.element_ty), mask=(row < count)[None, :, None] & (column < columns))
