"""The product with a `block` weight on a GPU, in Triton: only stored blocks are read and multiplied.

A program owns a row of blocks and some tokens, and walks along the stored blocks, several at a time, so that each step
is one matrix product of useful depth. Sums are float32 and in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparity.engine.kernels import gpu
from sparity.engine.kernels.triton_weight import TritonWeight

DEPTH = 128  # columns per step
SMALLEST = 16  # the least side of a matrix product in Triton
MOST_TOKENS = 64  # per program


def multiply(weight: TritonWeight, x: Tensor) -> Tensor:
    """`x` [tokens, columns] in the weight's type -> `[tokens, rows]`; int8 weights as in `reference.gemv_scaled`.

    An input that is not finite makes NaN of its product with a block that is not stored, as it does in dense.

    Raises:
        InvalidInput: shapes or types that do not fit.
    """
    weight.check_inputs(x)
    tokens, (rows, columns) = len(x), weight.shape
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    high, wide = weight.options["rows"], weight.options["columns"]
    padded_high, padded_wide = (max(SMALLEST, triton.next_power_of_2(side)) for side in (high, wide))
    together = max(1, DEPTH // padded_wide)
    at_once = min(MOST_TOKENS, max(SMALLEST, triton.next_power_of_2(tokens)))
    not_finite = (~x.isfinite()).sum(1, dtype=torch.int32)
    parts = (weight.part[name] for name in ("columns", "offsets", "values", "scales"))
    _multiply[(len(weight.part["offsets"]) - 1, -(-tokens // at_once))](
        x.contiguous(),
        not_finite,
        *parts,
        out,
        tokens,
        rows,
        columns,
        high,
        wide,
        padded_high,
        padded_wide,
        together,
        at_once,
        weight.quantized,
        gpu.interpreted(),
    )
    return out


@triton.jit
def _multiply(
    x,  # [tokens, width]
    not_finite,  # [tokens]: how many inputs of each token are not
    columns,
    offsets,
    values,
    scales,
    out,  # [tokens, rows]
    tokens,
    rows,
    width,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    PADDED_HIGH: tl.constexpr,
    PADDED_WIDE: tl.constexpr,
    TOGETHER: tl.constexpr,
    TOKENS: tl.constexpr,
    SCALED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    down = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    first, last = tl.load(offsets + down).to(tl.int32), tl.load(offsets + down + 1).to(tl.int32)
    high = tl.arange(0, PADDED_HIGH)
    place = tl.arange(0, TOGETHER * PADDED_WIDE)
    wide = place % PADDED_WIDE
    lines = x + token.to(tl.int64)[None, :] * width
    sums = tl.zeros([PADDED_HIGH, TOKENS], tl.float32)
    for step in range(first, last, TOGETHER):
        block = step + place // PADDED_WIDE
        stored = (block < last) & (wide < WIDE)
        at = (block.to(tl.int64) * (HIGH * WIDE) + wide)[None, :] + (high * WIDE)[:, None]
        weights = tl.load(values + at, mask=stored[None, :] & (high < HIGH)[:, None], other=0)
        column = tl.load(columns + block, mask=stored, other=0) * WIDE + wide
        inside = (stored & (column < width))[:, None] & (token < tokens)[None, :]
        inputs = tl.load(lines + column[:, None], mask=inside, other=0)
        if WIDEN:  # the interpreter takes bfloat16 in `dot` for whole numbers
            inputs = inputs.to(tl.float32)
        weights = weights.to(inputs.dtype)  # int8 fits every type
        sums = tl.dot(weights, inputs, sums, input_precision="ieee")
    missed = tl.load(not_finite + token, mask=token < tokens, other=0)
    if tl.max(missed, 0) > 0:  # rare: which of them met a stored block?
        for step in range(first, last, TOGETHER):
            block = step + place // PADDED_WIDE
            stored = (block < last) & (wide < WIDE)
            column = tl.load(columns + block, mask=stored, other=0) * WIDE + wide
            inside = (stored & (column < width))[:, None] & (token < tokens)[None, :]
            inputs = tl.load(lines + column[:, None], mask=inside, other=0).to(tl.float32)
            missed -= tl.sum((tl.abs(inputs) < float("inf")).to(tl.int32) ^ 1, 0)
        sums = tl.where((missed > 0)[None, :], float("nan"), sums)
    row = down * HIGH + high
    fits = (high < HIGH) & (row < rows)
    if SCALED:
        sums *= tl.load(scales + row, mask=fits, other=0)[:, None]
    at = token.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out + at, sums, mask=fits[:, None] & (token < tokens)[None, :])
