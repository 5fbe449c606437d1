"""The Cholesky factor of an inverse, with the work that symmetry leaves."""

import torch
from torch import Tensor

SMALL_TRIANGLE = 256


def factor_of_inverse(matrix: Tensor) -> Tensor | None:
    """Upper U `[in, in]` with UT U = the inverse of `matrix`, or None when it is not positive definite in float32.

    Only the upper triangle of `matrix` is read. A Cholesky factorisation from the last row to the first gives
    matrix = R RT with R upper triangular, so U is the inverse of R: one factorisation and a triangular inverse, where
    inverting first would take two and a full inverse.
    """
    reversed_lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed):
        return None
    upper = torch.zeros_like(matrix)
    _invert_upper(reversed_lower.flip(0, 1), upper)
    return upper if bool(torch.isfinite(upper.diagonal()).all()) else None


def _invert_upper(matrix: Tensor, into: Tensor) -> None:
    """Write the inverse of an upper triangular matrix `into` a zeroed one, by halves.

    [[A, B], [0, C]] has the inverse [[A', -A' B C'], [0, C']]: two triangular solves for the corner, large enough to
    run at the speed of products.
    """
    size = len(matrix)
    if size <= SMALL_TRIANGLE:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        into.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = size // 2
    first, corner, last = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    _invert_upper(first, into[:half, :half])
    _invert_upper(last, into[half:, half:])
    solved = torch.linalg.solve_triangular(first, corner.neg(), upper=True)
    into[:half, half:] = torch.linalg.solve_triangular(last, solved, upper=True, left=False)
