"""Attention by blocks by the compiled kernels; see `reference`. Blocks that are left out are not computed."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from sparity.engine.kernels import native
from sparity.errors import InvalidInput

TYPES = {torch.float32: 0, torch.bfloat16: 2}  # SPARITY_FLOAT32, SPARITY_BFLOAT16
STEP, MOST_WIDTH = 16, 512
_Strides = ctypes.c_int64 * 3


class _BlockAttention(ctypes.Structure):
    """`SparityBlockAttention` of csrc/sparity_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "width", "value_width", "fresh", "length")),
        *((name, ctypes.c_int64) for name in ("query_block", "key_block", "query_blocks", "key_blocks")),
        *((name, ctypes.c_void_p) for name in ("kept", "pads", "drains")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
        ("type", ctypes.c_int32),
        *((name, _Strides) for name in ("q_strides", "k_strides", "v_strides", "out_strides")),
    )


def declines(dtype: torch.dtype, width: int, value_width: int) -> str | None:
    """Why the library does not attend by blocks, or None when it does.

    Args:
        dtype: of queries, keys and values.
        width: of queries and keys.
        value_width: of values.
    """
    if reason := native.unavailable():
        return reason
    if dtype not in TYPES:
        return f"attention is in {str(dtype).removeprefix('torch.')}, not float32 or bfloat16"
    for size in (width, value_width):
        if size % STEP or size > MOST_WIDTH:
            return f"heads of {size} numbers are no multiple of {STEP} up to {MOST_WIDTH}"
    return None


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    block: tuple[int, int],
    scale: float,
    *,
    pads: Sequence[int] | None = None,
    cap: float = 0.0,
    drains: Tensor | None = None,
) -> Tensor:
    """`q` [rows, heads, fresh, width], the last tokens of a text -> `[rows, fresh, heads, value_width]`, in its type.

    Numbers of a token lie one behind the other in each tensor; tokens, heads and rows lie as they like. The result does
    not depend on the number of threads, nor a row's on the others.

    Args:
        q: see `reference.attend_blocks`, as are all others.
        k: see there.
        v: see there.
        kept: see there; contiguous.
        block: see there.
        scale: see there.
        pads: see there.
        cap: see there.
        drains: float32 `[heads]`, contiguous.

    Raises:
        InvalidInput: the library takes no such heads; `declines` would have said so.
    """
    rows, heads, fresh, width = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(rows, fresh, heads, v.shape[-1])
    counted = None if pads is None else torch.tensor(pads)
    of = _BlockAttention(
        rows=rows,
        heads=heads,
        kv_heads=k.shape[1],
        width=width,
        value_width=v.shape[-1],
        fresh=fresh,
        length=k.shape[2],
        query_block=block[0],
        key_block=block[1],
        query_blocks=kept.shape[2],
        key_blocks=kept.shape[3],
        kept=kept.data_ptr(),
        pads=None if counted is None else counted.data_ptr(),
        drains=None if drains is None else drains.data_ptr(),
        scale=scale,
        cap=cap,
        type=TYPES[q.dtype],
        q_strides=_Strides(*q.stride()[:3]),
        k_strides=_Strides(*k.stride()[:3]),
        v_strides=_Strides(*v.stride()[:3]),
        out_strides=_Strides(*out.transpose(1, 2).stride()[:3]),
    )
    states = (x.data_ptr() for x in (q, k, v, out))
    if native.library().sparity_attend_blocks(ctypes.byref(of), *states, native.threads()):
        raise InvalidInput(f"attend_blocks: the library refused heads of {width} and {v.shape[-1]} in {q.dtype}")
    return out
