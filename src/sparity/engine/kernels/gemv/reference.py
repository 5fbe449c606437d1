"""What GEMV means: the specification that every back end is tested against.

Floating-point weights: sums in float64. int8 weights have two meanings. On the processor, and in NVIDIA's 2:4, whose
products are of whole numbers too, inputs are quantised per token, symmetric (W8A8), and sums are exact: `gemv_int8`.
Triton's kernels leave the inputs as they are: `gemv_scaled`. int4 weights meet inputs that are quantised in the
weights' groups: `gemv_int4`. A GPU waits for memory with few inputs, so whole numbers
would gain nothing there, and quantising would cost one more launch and some accuracy.
"""

import torch
from torch import Tensor

LARGEST = 127
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def gemv(weight: Tensor, x: Tensor) -> Tensor:
    """`weight` [rows, columns], `x` [tokens, columns] -> float64 `[tokens, rows]`; 0 * inf and 0 * NaN are NaN."""
    return x.double() @ weight.double().T


def gemv_columns(weight: Tensor, x: Tensor) -> Tensor:
    """`gemv` in the format columns: an input of 0 adds nothing, so 0 * inf and 0 * NaN are 0 there."""
    products = x.double()[:, None] * weight.double()  # [tokens, rows, columns]
    return products.masked_fill((x == 0)[:, None], 0).sum(-1)


def gemv_int8(values: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """int8 `values` [rows, columns] with float32 `scales` [rows], `x` [tokens, columns] -> float64 `[tokens, rows]`.

    A token that is not finite gives NaN in every row.
    """
    quantized, token_scales = quantize_tokens(x)
    sums = quantized.double() @ values.double().T
    return sums * (token_scales.double()[:, None] * scales.double())


def gemv_int4(steps: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """`steps` [rows, columns], code - zero, `scales` [rows, groups], `x` [tokens, columns] -> float64 `[tokens, rows]`.

    A token that is not finite gives NaN in every row.
    """
    group = steps.shape[1] // scales.shape[1]
    quantized, group_scales = quantize_groups(x, group)
    inputs = quantized.double() * group_scales.double().repeat_interleave(group, 1)
    return inputs @ (steps.double() * scales.double().repeat_interleave(group, 1)).T


def gemv_scaled(values: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """int8 `values` [rows, columns] with float32 `scales` [rows], `x` [tokens, columns] -> float64 `[tokens, rows]`.

    The scale multiplies the sum.
    """
    return gemv(values, x) * scales.double()


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [tokens, columns] -> int8 `[tokens, columns]` and float32 scales `[tokens]`.

    The scale is the largest magnitude / 127 (1 for a token of zeros, at least the smallest normal float32, NaN for a
    token that is not finite); a value is `round(x / scale)` in float32, ties to even.
    """
    x = x.float()
    largest = x.abs().amax(1)
    scales = (largest / LARGEST).clamp(min=SMALLEST_NORMAL)
    scales = torch.where(largest == 0, 1.0, scales)
    scales = torch.where(largest.isfinite(), scales, float("nan"))
    return (x / scales[:, None]).round().nan_to_num(0).to(torch.int8), scales


def quantize_groups(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`x` [tokens, columns] -> int8 `[tokens, columns]` and float32 scales `[tokens, columns / group]`.

    Each group of neighbours as in `quantize_tokens`.
    """
    values, scales = quantize_tokens(x.reshape(-1, group))
    return values.view(x.shape), scales.view(len(x), -1)


def error_bound(weight: Tensor, x: Tensor, unit: float) -> Tensor:
    """float64 `[tokens, rows]`: how far rounding may move a result, the sum of |weight x| times `unit`.

    `unit` is the number of roundings that can pile up times half the last place. Processors with bfloat16 products take
    subnormal numbers for 0; each of them adds at most the smallest normal float32 times its partner.
    """
    subnormal = SMALLEST_NORMAL * (x.double().abs().sum(1)[:, None] + weight.double().abs().sum(1) + 1)
    return x.double().abs() @ weight.double().abs().T * unit + subnormal
