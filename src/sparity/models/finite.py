"""Tensors of a checkpoint in the type that they are wanted in, refused where that holds no numbers."""

import torch
from torch import Tensor

from sparity.errors import NumericalError

PIECE = 1 << 20  # numbers checked at once, and counted in ten times their memory


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another floating-point type; whole numbers and flags stay."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def cast_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As `cast`, of the stored tensor `name`.

    Raises:
        NumericalError: NaN or infinite numbers, in the file or in that type.
    """
    found = cast(tensor, dtype)
    bad = _count_not_finite(found) if found.is_floating_point() else 0
    if bad:
        words = f"{name.removesuffix('.weight')}: {bad} of {tensor.numel()} weights are"
        if _count_not_finite(tensor):
            raise NumericalError(f"{words} NaN or infinite; the checkpoint is damaged: fetch or save it again")
        raise NumericalError(f"{words} too large for {dtype}; choose another dtype")
    return found


def _count_not_finite(tensor: Tensor) -> int:
    """In pieces, since a check of the whole would take twice the tensor's memory."""
    pieces = torch.split(tensor.reshape(-1), PIECE)
    return sum(piece.numel() - int(torch.isfinite(piece).sum()) for piece in pieces)
