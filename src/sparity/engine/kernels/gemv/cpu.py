"""GEMV on the processor, by the compiled kernels of csrc/."""

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
    rows, columns = weight.packed.shape
    if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != columns or x.device.type != "cpu":
        raise InvalidInput(f"gemv: bfloat16 inputs [tokens, {columns}] are needed, not {list(x.shape)} in {x.dtype}")
    if out is None:
        out = torch.empty(x.shape[0], rows, dtype=torch.bfloat16)
    elif out.shape != (x.shape[0], rows) or out.dtype not in (torch.bfloat16, torch.float32) or not out.is_contiguous():
        raise InvalidInput(f"gemv: `out` must be contiguous {[x.shape[0], rows]} in bfloat16 or float32")
    if x.shape[0]:
        x = x.contiguous()
        wide = out.dtype == torch.float32
        status = native.library().sparity_gemv(
            weight.address, x.data_ptr(), out.data_ptr(), wide, x.shape[0], native.threads()
        )
        if status:
            raise InvalidInput(f"gemv: the library refused {weight!r}")
    return out
