"""GEMV on the processor, by the compiled kernels of csrc/."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from sparity.engine.kernels import native
from sparity.engine.kernels.native_weight import NativeWeight
from sparity.errors import InvalidInput

MOST_TOKENS = 16  # beyond, multiplying is what takes the time, and prefill is faster


def gemv(weight: NativeWeight, x: Tensor, out: Tensor | None = None) -> Tensor:
    """`x` bfloat16 `[tokens, columns]` -> `[tokens, rows]` in bfloat16, or in `out`, bfloat16 or float32.

    Sums are float32. The result is the same for every number of threads.

    Raises:
        InvalidInput: shapes or types that do not fit.
    """
    _check_input(weight, x)
    out = _output(weight, x, out)
    if x.shape[0]:
        x = x.contiguous()
        wide = out.dtype == torch.float32
        status = native.library().sparity_gemv(
            weight.address, x.data_ptr(), out.data_ptr(), wide, x.shape[0], native.threads()
        )
        if status:
            raise InvalidInput(f"gemv: the library refused {weight!r}")
    return out


def gemv_many(weights: Sequence[NativeWeight], x: Tensor, outs: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Several weights `[rows, columns]` that share an input, in one call -> what `gemv` gives for each, bit for bit.

    The weights may have any formats and rows; the input is prepared once, and threads share all rows out together.

    Args:
        weights: with the same columns.
        x: bfloat16 `[tokens, columns]`.
        outs: `[tokens, rows]` for each weight, all bfloat16 or all float32.

    Raises:
        InvalidInput: shapes or types that do not fit.
    """
    for weight in weights:
        _check_input(weight, x)
    if outs is not None and (len(outs) != len(weights) or len({out.dtype for out in outs}) > 1):
        raise InvalidInput(f"gemv_many: `outs` must be {len(weights)} tensors of one type")
    made = [_output(weight, x, outs[place] if outs is not None else None) for place, weight in enumerate(weights)]
    if made and x.shape[0]:
        x = x.contiguous()
        pointers = ctypes.c_void_p * len(made)
        status = native.library().sparity_gemv_many(
            pointers(*(weight.address for weight in weights)),
            len(made),
            pointers(*[x.data_ptr()] * len(made)),
            pointers(*(out.data_ptr() for out in made)),
            made[0].dtype == torch.float32,
            x.shape[0],
            native.threads(),
        )
        if status:
            raise InvalidInput(f"gemv_many: the library refused {list(weights)}")
    return made


def gemv_rows(weight: NativeWeight, rows: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Some rows of a dense weight: `out[:, rows]` becomes that of `gemv`, bit for bit; the rest stays as it was.

    Args:
        weight: in the format dense.
        rows: int32 `[count]`, rising, within the weight.
        x: bfloat16 `[tokens, columns]`.
        out: `[tokens, rows]` in bfloat16 or float32.

    Raises:
        InvalidInput: shapes, types or rows that do not fit, or another format.
    """
    _check_input(weight, x)
    _output(weight, x, out)
    limit = weight.packed.shape[0]
    inside = rows.dtype == torch.int32 and rows.dim() == 1 and bool(((rows >= 0) & (rows < limit)).all())
    if not inside or bool((rows.diff() <= 0).any()) or weight.packed.format != "dense":
        raise InvalidInput(f"gemv_rows: rising int32 rows below {limit} of a dense weight are needed")
    if x.shape[0] and len(rows):
        x, rows = x.contiguous(), rows.contiguous()
        wide = out.dtype == torch.float32
        pointers = (rows.data_ptr(), len(rows), x.data_ptr(), out.data_ptr())
        if native.library().sparity_gemv_rows(weight.address, *pointers, wide, x.shape[0], native.threads()):
            raise InvalidInput(f"gemv_rows: the library refused {weight!r}")
    return out


def _check_input(weight: NativeWeight, x: Tensor) -> None:
    columns = weight.packed.shape[1]
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != columns or x.device.type != "cpu":
        raise InvalidInput(f"gemv: bfloat16 inputs [tokens, {columns}] are needed, not {list(x.shape)} in {x.dtype}")


def _output(weight: NativeWeight, x: Tensor, out: Tensor | None) -> Tensor:
    shape = (x.shape[0], weight.packed.shape[0])
    if out is None:
        return torch.empty(shape, dtype=torch.bfloat16)
    if out.shape != shape or out.dtype not in (torch.bfloat16, torch.float32) or not out.is_contiguous():
        raise InvalidInput(f"gemv: `out` must be contiguous {list(shape)} in bfloat16 or float32")
    return out
