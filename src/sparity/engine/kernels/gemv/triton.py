"""GEMV of `bitmask` on a GPU, in Triton; the layout of the file is read as it is.

A program owns tiles of 4 rows and a range of their groups of 64 columns. Each thread expands one byte of a mask, 8
weights, so that a warp covers a group: the group's masks are one load of 32 bytes, and its values lie side by side. The
place where a group's values begin is counted when the weight is moved (`TritonWeight.starts`), so no program waits for
another. Several ranges of one tile (`splits`) give float32 partial sums, which a second kernel adds in their order:
nothing is atomic, and a result depends on weight, inputs and launch alone.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparity.engine.kernels import gpu
from sparity.engine.kernels.bitmask_expand import expand
from sparity.engine.kernels.triton_weight import TritonWeight
from sparity.errors import InvalidInput
from sparity.formats.storage.tiles import COLUMNS

MOST_TOKENS = 16  # beyond, prefill
BUSY = 8  # programs per multiprocessor that hide each other's waiting
ADDED_AT_ONCE = 256


@dataclass(frozen=True)
class Launch:
    """How the work is cut.

    Attributes:
        places: one token: groups of a tile at a time; more tokens: tiles at a time. A power of two, for several tokens
            at least 4.
        splits: ranges of columns whose partial sums are added afterwards.
        warps: of 32 threads, per program.
    """

    places: int
    splits: int
    warps: int = 4


def launch_for(weight: TritonWeight, tokens: int) -> Launch:
    """Enough programs to fill the GPU, and no more splits than that takes."""
    tiles, groups = weight.part["masks"].shape[:2]
    places = 4 if tokens == 1 else 8
    programs, steps = (tiles, -(-groups // places)) if tokens == 1 else (-(-tiles // places), groups)
    wanted = BUSY * gpu.processors(weight.device)
    splits = 1
    while programs * splits < wanted and steps >= 4 * splits:
        splits *= 2
    return Launch(places, splits)


def gemv(weight: TritonWeight, x: Tensor, out: Tensor | None = None, launch: Launch | None = None) -> Tensor:
    """`x` [tokens, columns], at most 16 tokens, in the weight's type -> `[tokens, rows]` in it, or in `out`.

    Sums are float32; `out` may be float32 as well. int8 weights as in `reference.gemv_scaled`.

    Raises:
        InvalidInput: shapes or types that do not fit.
    """
    weight.check_inputs(x)
    tokens, (rows, columns) = len(x), weight.shape
    if tokens > MOST_TOKENS:
        raise InvalidInput(f"gemv: at most {MOST_TOKENS} inputs, not {tokens}; prefill takes more")
    if out is None:
        out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    elif out.shape != (tokens, rows) or out.dtype not in (x.dtype, torch.float32) or not out.is_contiguous():
        raise InvalidInput(f"gemv: `out` must be contiguous {[tokens, rows]} in {x.dtype} or float32")
    if not tokens:
        return out
    tiles, groups = weight.part["masks"].shape[:2]
    # zeros behind the last column, so that kernels need not look where it is
    x = torch.nn.functional.pad(x, (0, groups * COLUMNS - columns)) if columns % COLUMNS else x.contiguous()
    launch = launch or launch_for(weight, tokens)
    splits = min(launch.splits, groups)
    sums = out if splits == 1 else torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    arguments = (x, *(weight.part[name] for name in ("masks", "starts", "offsets", "values", "scales")), sums)
    sizes = (rows, groups, -(-groups // splits))
    scaled = weight.quantized and splits == 1
    if tokens == 1:
        _one_token[(tiles, splits)](*arguments, *sizes, launch.places, scaled, num_warps=launch.warps)
    else:
        grid = (-(-tiles // launch.places), splits)
        _tokens[grid](
            *arguments, tokens, tiles, *sizes, launch.places, scaled, gpu.interpreted(), num_warps=launch.warps
        )
    if splits > 1:
        grid = (-(-rows // ADDED_AT_ONCE), tokens)
        _add[grid](sums, weight.part["scales"], out, tokens, rows, splits, weight.quantized, ADDED_AT_ONCE)
    return out


@triton.jit
def _one_token(
    x, masks, starts, offsets, values, scales, out, rows, groups, per_split, P: tl.constexpr, SCALED: tl.constexpr
):
    tile, split = tl.program_id(0), tl.program_id(1)
    byte = tl.arange(0, 32)  # of a group: 8 * row + byte
    first = split * per_split
    last = tl.minimum(first + per_split, groups)
    starts += tile.to(tl.int64) * groups
    masks += tile.to(tl.int64) * groups * 32
    values += tl.load(offsets + tile)
    column = (byte % 8 * 8)[None, :, None] + tl.arange(0, 8)[None, None, :]
    products = tl.zeros([P, 32, 8], tl.float32)
    for step in range(first, last, P):
        group = step + tl.arange(0, P)
        inside = group < last
        start = tl.load(starts + group, mask=inside, other=0)
        mask = tl.load(masks + group[:, None] * 32 + byte[None, :], mask=inside[:, None], other=0)
        weights = expand(values, mask, start)
        inputs = tl.load(x + group[:, None, None] * 64 + column, mask=inside[:, None, None], other=0)
        products += weights.to(tl.float32) * inputs.to(tl.float32)
    sums = tl.sum(tl.reshape(tl.sum(tl.sum(products, 2), 0), (4, 8)), 1)
    row = tile * 4 + tl.arange(0, 4)
    if SCALED:
        sums *= tl.load(scales + row, mask=row < rows, other=0)
    tl.store(out + split * rows + row, sums, mask=row < rows)


@triton.jit
def _tokens(
    x,  # [tokens, groups * 64]
    masks,
    starts,
    offsets,
    values,
    scales,
    out,  # [splits, tokens, rows]
    tokens,
    tiles,
    rows,
    groups,
    per_split,
    P: tl.constexpr,
    SCALED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile = tl.program_id(0) * P + tl.arange(0, P)
    split = tl.program_id(1)
    byte, token, column = tl.arange(0, 32), tl.arange(0, 16), tl.arange(0, 64)
    first = split * per_split
    last = tl.minimum(first + per_split, groups)
    inside = tile < tiles
    begin = tile.to(tl.int64) * groups
    values += tl.load(offsets + tile, mask=inside, other=0)[:, None, None]
    sums = tl.zeros([4 * P, 16], tl.float32)
    for group in range(first, last):
        start = tl.load(starts + begin + group, mask=inside, other=0)
        mask = tl.load(masks + (begin + group)[:, None] * 32 + byte[None, :], mask=inside[:, None], other=0)
        weights = tl.reshape(expand(values, mask, start), (4 * P, 64))
        at = token[None, :] * (groups * 64) + group * 64 + column[:, None]
        inputs = tl.load(x + at, mask=token[None, :] < tokens, other=0)
        if WIDEN:  # the interpreter takes bfloat16 in `dot` for whole numbers
            inputs = inputs.to(tl.float32)
        weights = weights.to(inputs.dtype)  # int8 fits every type
        sums = tl.dot(weights, inputs, sums, input_precision="ieee")
    row = tl.program_id(0) * (4 * P) + tl.arange(0, 4 * P)
    if SCALED:
        sums *= tl.load(scales + row, mask=row < rows, other=0)[:, None]
    at = (split * tokens + token[None, :]) * rows + row[:, None]
    tl.store(out + at, sums, mask=(row < rows)[:, None] & (token < tokens)[None, :])


@triton.jit
def _add(sums, scales, out, tokens, rows, splits, SCALED: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    token = tl.program_id(1)
    total = tl.zeros([SIZE], tl.float32)
    for split in range(splits):
        total += tl.load(sums + (split * tokens + token) * rows + row, mask=row < rows, other=0)
    if SCALED:
        total *= tl.load(scales + row, mask=row < rows, other=0)
    tl.store(out + token * rows + row, total, mask=row < rows)
