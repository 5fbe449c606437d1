"""GEMV of `columns` on a GPU, in Triton: input channels that do not count are not read.

A program owns a range of rows and of channels, for one token. It compares its channels with their thresholds, and loads
a channel's weights, which lie side by side, only where it counts. Ranges of channels (`splits`) give float32 partial
sums, which a second kernel adds in their order: nothing is atomic, and a token's result depends neither on other tokens
nor on how many there are. For a gate and an up projection in one weight, that second kernel is also what joins them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparity.engine.kernels import gpu
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.engine.kernels.triton_weight import TritonWeight
from sparity.errors import InvalidInput

MOST_TOKENS = 16
BUSY = 8  # programs per multiprocessor that hide each other's waiting
ADDED_AT_ONCE = 256
FUNCTIONS = {None: 0, "silu": 1, "relu": 2}  # what joins a gate with its up projection


@dataclass(frozen=True)
class SkipLaunch:
    """How the work is cut.

    Attributes:
        rows: of a program, a power of two.
        channels: at a time, a power of two.
        splits: ranges of channels whose partial sums are added afterwards.
        warps: of 32 threads, per program.
    """

    rows: int = 128
    channels: int = 32
    splits: int = 1
    warps: int = 4


def launch_for(weight: TritonWeight, tokens: int) -> SkipLaunch:
    """Enough programs to fill the GPU, and no more splits than that takes."""
    rows, columns = weight.shape
    launch, splits = SkipLaunch(), 1
    programs, wanted = -(-rows // launch.rows) * tokens, BUSY * gpu.processors(weight.device)
    while programs * splits < wanted and columns >= 4 * splits * launch.channels:
        splits *= 2
    return SkipLaunch(splits=splits)


def gemv(
    weight: TritonWeight,
    x: Tensor,
    rule: SkipRule | None = None,
    launch: SkipLaunch | None = None,
    *,
    joined: str | None = None,
) -> Tensor:
    """`weight @ (x - centre)` over the channels that count, without the others' weights being read.

    Differences, products and sums are float32; int8 weights as in `gemv.reference.gemv_scaled`. NaN counts.

    Args:
        weight: in `columns`, on a device.
        x: `[tokens, columns]`, at most 16 tokens, in the weight's type.
        rule: which channels count, and the centre; None = those that are not 0. Its scale is `constant` or `rms`: for
            the others give `rule.apply(x)`, and no rule.
        launch: how the work is cut; None = by the shape.
        joined: None, or `silu` or `relu`: the rows are those of a gate and then those of an up projection, and the
            result is `function(gate) * up`.

    Returns:
        `[tokens, rows]`, or `[tokens, rows / 2]` where joined, in the weight's type.

    Raises:
        InvalidInput: shapes, types or rules that do not fit.
    """
    weight.check_inputs(x)
    tokens, (rows, columns) = len(x), weight.shape
    if weight.format != "columns" or tokens > MOST_TOKENS:
        raise InvalidInput(f"skip: a weight by columns and at most {MOST_TOKENS} inputs, not {weight.format}, {tokens}")
    if joined not in FUNCTIONS or (joined and rows % 2):
        raise InvalidInput(f"skip: joined by {joined}: silu or relu, and as many rows of gate and up, not {rows}")
    thresholds, centre, scales = _numbers(rule, x)
    out = torch.empty(tokens, rows // 2 if joined else rows, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    launch = launch or launch_for(weight, tokens)
    splits = min(launch.splits, columns)
    sums = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    grid = (-(-rows // launch.rows), splits, tokens)
    _partial[grid](
        x.contiguous(), thresholds, centre, scales, weight.part["values"], sums, tokens, rows, columns,
        -(-columns // splits), launch.channels, launch.rows, rule is not None, num_warps=launch.warps,
    )  # fmt: skip
    _finish[-(-out.shape[1] // ADDED_AT_ONCE), tokens](
        sums, weight.part["scales"], out, tokens, rows, out.shape[1], splits, weight.quantized, FUNCTIONS[joined],
        ADDED_AT_ONCE,
    )  # fmt: skip
    return out


def _numbers(rule: SkipRule | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds and centre, float32 `[columns]`, and what each token's thresholds are multiplied by, `[tokens]`."""
    tokens, columns = x.shape
    if rule is None:
        nothing = torch.empty(0, dtype=torch.float32, device=x.device)
        return nothing, nothing, nothing
    if rule.scale not in ("constant", "rms"):
        raise InvalidInput(f"skip: no GPU kernel for the scale {rule.scale}: give rule.apply(x), and no rule")
    sizes = {tuple(rule.threshold.shape), *(() if rule.centre is None else (tuple(rule.centre.shape),))}
    if not sizes <= {(), (columns,)} or bool((rule.threshold < 0).any()) or bool(rule.threshold.isnan().any()):
        raise InvalidInput(f"skip: one threshold, or {columns}, none negative, are needed, not {sorted(sizes)}")
    thresholds = rule.threshold.to(x.device, torch.float32).expand(columns).contiguous()
    centre = torch.zeros_like(thresholds) if rule.centre is None else rule.centre.to(x.device, torch.float32)
    rms = x.double().pow(2).mean(-1).sqrt().float() if rule.scale == "rms" else torch.ones(tokens, device=x.device)
    return thresholds, centre.contiguous(), rms


@triton.jit
def _partial(
    x,  # [tokens, columns]
    thresholds,
    centre,
    scales,
    values,  # [columns, rows]
    sums,  # [splits, tokens, rows]
    tokens,
    rows,
    columns,
    per_split,
    K: tl.constexpr,
    R: tl.constexpr,
    RULED: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    split, token = tl.program_id(1), tl.program_id(2)
    first = split * per_split
    last = tl.minimum(first + per_split, columns)
    products = tl.zeros([K, R], tl.float32)
    for step in range(first, last, K):
        channel = step + tl.arange(0, K)
        inside = channel < last
        value = tl.load(x + token * columns + channel, mask=inside, other=0).to(tl.float32)
        if RULED:
            value -= tl.load(centre + channel, mask=inside, other=0)
            limit = tl.load(thresholds + channel, mask=inside, other=0) * tl.load(scales + token)
            counts = (tl.abs(value) > limit) | (value != value)
        else:
            counts = value != 0
        counts &= inside
        at = channel.to(tl.int64)[:, None] * rows + row[None, :]
        weights = tl.load(values + at, mask=counts[:, None] & (row < rows)[None, :], other=0).to(tl.float32)
        products += tl.where(counts[:, None], weights * value[:, None], 0.0)
    tl.store(sums + (split * tokens + token) * rows + row, tl.sum(products, 0), mask=row < rows)


@triton.jit
def _total(sums, scales, token, row, inside, tokens, rows, splits, SCALED: tl.constexpr, SIZE: tl.constexpr):
    total = tl.zeros([SIZE], tl.float32)
    for split in range(splits):
        total += tl.load(sums + (split * tokens + token) * rows + row, mask=inside, other=0)
    if SCALED:
        total *= tl.load(scales + row, mask=inside, other=0)
    return total


@triton.jit
def _finish(
    sums,
    scales,
    out,
    tokens,
    rows,
    outputs,
    splits,
    SCALED: tl.constexpr,
    FUNCTION: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    token = tl.program_id(1)
    inside = row < outputs
    found = _total(sums, scales, token, row, inside, tokens, rows, splits, SCALED, SIZE)
    if FUNCTION:
        up = _total(sums, scales, token, row + outputs, inside, tokens, rows, splits, SCALED, SIZE)
        if FUNCTION == 1:
            small = tl.exp(-tl.abs(found))
            found *= tl.where(found < 0, small, 1.0) / (1 + small)
        if FUNCTION == 2:
            found = tl.where(found < 0, 0.0, found)  # NaN stays
        found *= up
    tl.store(out + token * outputs + row, found, mask=inside)
