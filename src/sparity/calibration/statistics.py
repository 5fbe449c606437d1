"""What calibration learns about the input of a projection: raw sums that merge, and what follows from them."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparity.errors import InvalidInput, NumericalError

log = logging.getLogger(__name__)

# Raw sums over tokens, as functions of the inputs x [tokens, in] in float32.
_SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0),  # [in]
    "sum_of_squares": lambda x: x.square().sum(0),  # [in]
    "gram": lambda x: x.T @ x,  # [in, in]
}
# What a score or solver may ask for -> the raw sum that it is made of.
STATISTICS = {"mean": "sum", "column_norm": "sum_of_squares", "gram": "gram"}
# Statistics of a projection's own gradient [out, in] over sequences: its mean, and the mean of its squares.
GRADIENTS = ("gradient", "gradient_square")

DAMPING = 0.01  # share of the mean diagonal that is added to it before a factorisation
MAX_DAMPING = 1.0
SMALL_TRIANGLE = 256


@dataclass
class Statistics:
    """Sums over the inputs of one or more projections, in float32, and perhaps the gradients of one of them.

    Args:
        site: the name used in messages.
        needs: which of `STATISTICS` to gather.
        gradients: those of `GRADIENTS` that are known, each `[out, in]`.
    """

    site: str
    needs: frozenset[str]
    sequences: int = 0
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    _factors: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def gather(cls, site: str, needs: Iterable[str]) -> "Statistics":
        """An empty collection for the given statistics.

        Raises:
            InvalidInput: an unknown statistic.
        """
        unknown = set(needs) - set(STATISTICS)
        if unknown:
            raise InvalidInput(f"unknown statistics {sorted(unknown)} (known: {', '.join(STATISTICS)})")
        return cls(site, frozenset(needs))

    def add(self, inputs: Tensor, sequences: int | None = None) -> None:
        """Count inputs `[sequences, tokens, in]`, or `[tokens, in]` as one sequence unless their number is given.

        Raises:
            NumericalError: NaN or infinite inputs.
        """
        if sequences is None:
            sequences = inputs.shape[0] if inputs.ndim == 3 else 1
        self.sequences += sequences
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(x)
        for name in {STATISTICS[need] for need in self.needs}:
            if name == "gram" and name in self.sums:
                self.sums[name].addmm_(x.T, x)  # without a second matrix of that size
            else:
                part = _SUMS[name](x)
                self.sums[name] = self.sums[name].add_(part) if name in self.sums else part
        # a number that is not finite, or too large to be squared, shows on the diagonal of a Gram matrix
        witnesses = [total.diagonal() if name == "gram" else total for name, total in self.sums.items()]
        if not all(bool(torch.isfinite(witness).all()) for witness in witnesses):
            raise NumericalError(
                f"{self.site}: the inputs hold NaN or infinite numbers; use a wider dtype (float32) or other text"
            )
        self._factors.clear()

    def merge(self, other: "Statistics") -> "Statistics":
        """The statistics of both halves of a calibration set together."""
        if self.needs != other.needs:
            raise InvalidInput(f"{self.site}: statistics of different kinds cannot be merged")
        sums = {name: total + other.sums[name] for name, total in self.sums.items()}
        return Statistics(self.site, self.needs, self.sequences + other.sequences, self.tokens + other.tokens, sums)

    def with_gradients(self, gradients: Mapping[str, Tensor]) -> "Statistics":
        """The same sums, shared and not copied, with the gradients of one projection: names of `GRADIENTS`."""
        return replace(self, gradients=gradients)

    @property
    def gradient(self) -> Tensor:
        """`[out, in]`: the mean over sequences of the gradient of a sequence's loss."""
        return self._gradient("gradient")

    @property
    def gradient_square(self) -> Tensor:
        """`[out, in]`: the mean over sequences of the squared gradient."""
        return self._gradient("gradient_square")

    @property
    def column_norm(self) -> Tensor:
        """`[in]`: the norm of each input channel, sqrt(sum of squares / sequences)."""
        return (self._sum("column_norm") / self.sequences).sqrt()

    @property
    def mean(self) -> Tensor:
        """`[in]`: the mean of each input channel over tokens."""
        return self._sum("mean") / self.tokens

    @property
    def gram(self) -> Tensor:
        """`[in, in]`: the sum of x xT over tokens."""
        return self._sum("gram")

    @property
    def hessian(self) -> Tensor:
        """`[in, in]`: 2/sequences times the Gram matrix, the layer's Hessian in SparseGPT's scale."""
        return self.gram * (2.0 / self.sequences)

    def inverse_factor(self, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
        """The upper Cholesky factor `[in, in]` of the inverse damped Hessian, and the dead channels `[in]`.

        The squared diagonal entry j is the j-th entry of the inverse Hessian of the channels from j on. A channel
        that never fired counts as dead: its diagonal is set to 1. When the matrix cannot be factorised the damping
        is raised, at least doubled each time, up to 1, and the step is logged.

        Raises:
            NumericalError: no input reached the site, or no damping up to 1 makes the matrix definite.
        """
        if damping not in self._factors:
            self._factors[damping] = self._factorise(damping)
        return self._factors[damping]

    def _factorise(self, damping: float) -> tuple[Tensor, Tensor]:
        hessian = self.hessian
        dead = hessian.diagonal() == 0
        if bool(dead.all()):
            raise NumericalError(f"{self.site}: the Gram matrix is zero: no calibration token gave it an input")
        hessian.diagonal()[dead] = 1.0
        diagonal = hessian.diagonal().clone()
        strength = damping
        while True:
            hessian.diagonal().copy_(diagonal + strength * diagonal.mean())
            factor = _upper_factor_of_inverse(hessian)
            if factor is not None:
                return factor, dead
            if strength >= MAX_DAMPING:
                raise NumericalError(
                    f"{self.site}: the Gram matrix is singular even with damping {strength:g}; "
                    "calibrate on more tokens or on other text"
                )
            stronger = min(max(2 * strength, DAMPING), MAX_DAMPING)
            log.warning("%s: Gram matrix singular with damping %g, trying %g", self.site, strength, stronger)
            strength = stronger

    def _gradient(self, statistic: str) -> Tensor:
        if statistic not in self.gradients:
            raise InvalidInput(f'{self.site}: the statistic "{statistic}" was not gathered; declare it in `needs`')
        return self.gradients[statistic]

    def _sum(self, statistic: str) -> Tensor:
        if statistic not in self.needs:
            raise InvalidInput(f'{self.site}: the statistic "{statistic}" was not gathered; declare it in `needs`')
        if not self.tokens:
            raise NumericalError(f"{self.site}: no calibration token reached it")
        return self.sums[STATISTICS[statistic]]


def _upper_factor_of_inverse(matrix: Tensor) -> Tensor | None:
    """U with UT U = the inverse of `matrix`, or None when it is not positive definite in float32.

    A Cholesky factorisation from the last row to the first gives matrix = R RT with R upper triangular, so U is the
    inverse of R: one factorisation and a triangular inverse, where inverting first would take two and a full inverse.
    """
    reversed_lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed):
        return None
    upper = torch.zeros_like(matrix)
    _invert_upper(reversed_lower.flip(0, 1), upper)
    return upper if bool(torch.isfinite(upper.diagonal()).all()) else None


def _invert_upper(matrix: Tensor, into: Tensor) -> None:
    """Write the inverse of an upper triangular matrix `into` a zeroed one, by halves, so that products do the work."""
    size = len(matrix)
    if size <= SMALL_TRIANGLE:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        into.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = size // 2
    _invert_upper(matrix[:half, :half], into[:half, :half])
    _invert_upper(matrix[half:, half:], into[half:, half:])
    into[:half, half:] = into[:half, :half] @ (matrix[:half, half:] @ into[half:, half:]).neg_()
