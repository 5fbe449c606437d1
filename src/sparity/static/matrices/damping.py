"""Something added to the diagonal of a matrix, so that it has an inverse."""

import torch
from torch import Tensor


def damped(matrix: Tensor, damping: float) -> Tensor:
    """A matrix `[n, n]` with a share of its mean diagonal added there; of one that is all zero the identity."""
    mean = float(matrix.diagonal().mean())
    ridge = damping * mean if mean else 1.0  # all zero: what it is of makes no difference, and stays apart
    return matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
