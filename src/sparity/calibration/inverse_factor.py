"""The Cholesky factor of an inverse, with the work that symmetry leaves."""

import torch
from torch import Tensor

from sparity.calibration.mapped import release
from sparity.memory import give_back

SMALL_TRIANGLE = 256
WHOLE = 4096  # rows up to which a matrix is factorised at once, in several copies of it
FP32 = 4
PANEL = 1024  # rows of a larger one that are worked on at a time
COPIES = 4.5  # of a matrix that is factorised at once: itself, turned around, its factor, that turned back, the inverse
PANELS = 4  # row panels of a larger one that are alive at once


def factor_bytes(columns: int, in_file: bool) -> int:
    """What `factor_of_inverse` needs, its matrix `[in, in]` counted unless that lies `in_file`."""
    if columns <= WHOLE:
        return int(COPIES * FP32 * columns**2)
    upper = FP32 * sum((part.stop - part.start) * (columns - part.start) for part in _panels(columns))
    return PANELS * FP32 * PANEL * columns + (0 if in_file else upper)


def factor_of_inverse(matrix: Tensor) -> Tensor | None:
    """Upper U `[in, in]` with UT U = the inverse of `matrix`, or None when it is not positive definite in float32.

    Only the upper triangle of `matrix` is read. A Cholesky factorisation from the last row to the first gives
    matrix = R RT with R upper triangular, so U is the inverse of R: one factorisation and a triangular inverse, where
    inverting first would take two and a full inverse.

    A matrix of more than 4,096 rows becomes its own factor, a panel of 1,024 rows at a time, so that nothing but a few
    panels is needed beside it. What lies below its diagonal panels must be zero. The steps are the same for a matrix in
    memory and in a file, and so are the bits.
    """
    if len(matrix) > WHOLE:
        return matrix if _factorise_panels(matrix) and _invert_panels(matrix) else None
    reversed_lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed):
        return None
    upper = torch.zeros_like(matrix)
    _invert_upper(reversed_lower.flip(0, 1), upper)
    return upper if bool(torch.isfinite(upper.diagonal()).all()) else None


def _factorise_panels(matrix: Tensor) -> bool:
    """Put R, of which `matrix` is R RT, in its place, from the last panel to the first; whether there is one."""
    panels = _panels(len(matrix))
    for number, rows in reversed(list(enumerate(panels))):
        own = _read(matrix, rows)  # [panel, in - start]
        for below in reversed(panels[number + 1 :]):
            _settle_tile(own, _shifted(below, rows.start), _read(matrix, below))
        height = len(own)
        corner = own[:, :height] - own[:, height:] @ own[:, height:].T  # what is below its diagonal is not looked at
        reversed_lower, failed = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if int(failed):
            return False
        own[:, :height] = reversed_lower.flip(0, 1)
        _write(matrix, rows, own)
    return True


def _invert_panels(matrix: Tensor) -> bool:
    """Put the inverse of an upper triangular matrix in its place, from the first panel to the last; if it is finite.

    Row panel U_i of the inverse has U_i R = (0, I, 0): each of its tiles follows from those before it.
    """
    panels = _panels(len(matrix))
    for number, rows in enumerate(panels):
        factor = _read(matrix, rows)
        height = len(factor)
        own = torch.zeros_like(factor)
        _invert_upper(factor[:, :height], own[:, :height])
        if not bool(torch.isfinite(own[:, :height].diagonal()).all()):
            return False
        own[:, height:] = own[:, :height] @ factor[:, height:]
        del factor
        for below in panels[number + 1 :]:
            _invert_tile(own, _shifted(below, rows.start), _read(matrix, below))
        _write(matrix, rows, own)
    return True


def _settle_tile(own: Tensor, here: slice, factor: Tensor) -> None:
    """The columns `here` of a row panel of R, from those behind them and the panel of R whose diagonal they meet."""
    height = len(factor)
    own[:, here] -= own[:, here.stop :] @ factor[:, height:].T
    corner = factor[:, :height].T  # lower
    own[:, here] = torch.linalg.solve_triangular(corner, own[:, here], upper=False, left=False)


def _invert_tile(own: Tensor, here: slice, factor: Tensor) -> None:
    """The columns `here` of a row panel of the inverse, and what they add to those behind them."""
    height = len(factor)
    own[:, here] = torch.linalg.solve_triangular(factor[:, :height], own[:, here].neg(), upper=True, left=False)
    own[:, here.stop :].addmm_(own[:, here], factor[:, height:])


def _panels(size: int) -> list[slice]:
    return [slice(start, min(start + PANEL, size)) for start in range(0, size, PANEL)]


def _shifted(part: slice, start: int) -> slice:
    return slice(part.start - start, part.stop - start)


def _read(matrix: Tensor, rows: slice) -> Tensor:
    """A copy of a row panel from its diagonal on, which lies together wherever the matrix does."""
    found = matrix[rows, rows.start :].clone(memory_format=torch.contiguous_format)
    release(matrix[rows])
    return found


def _write(matrix: Tensor, rows: slice, panel: Tensor) -> None:
    matrix[rows, rows.start :] = panel
    release(matrix[rows])
    give_back()


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
