"""What calibration learns about the input of a projection: raw sums that merge, and what follows from them."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparity.calibration.gram import add_gram, complete, factor_of_inverse
from sparity.errors import InvalidInput, NumericalError

log = logging.getLogger(__name__)

MAGNITUDES = 1 << 15  # bins of a histogram of |x|: the upper half of the bits of a float32, without its sign
INFINITE = 0x7F80  # the first of them that holds no finite numbers

# What a score or solver may ask for -> the raw sum that it is made of.
STATISTICS = {"mean": "sum", "column_norm": "sum_of_squares", "gram": "gram", "histogram": "histogram"}
# Statistics of a projection's own gradient [out, in] over sequences: of the loss its mean and the mean of its squares,
# of the norm of the block's output the mean of its squares.
GRADIENTS = ("gradient", "gradient_square")
REGIONAL = "regional_gradient_square"

DAMPING = 0.01  # share of the mean diagonal that is added to it before a factorisation
MAX_DAMPING = 1.0


@dataclass
class Statistics:
    """Sums over the inputs of one or more projections, in float32, and perhaps the gradients of one of them.

    Args:
        site: the name used in messages.
        needs: which of `STATISTICS` to gather.
        gradients: those of `GRADIENTS` and `REGIONAL` that are known, each `[out, in]`.
    """

    site: str
    needs: frozenset[str]
    sequences: int = 0
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    _factors: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _complete: bool = field(default=False, repr=False)  # whether the Gram matrix has its lower triangle

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
            if name not in self.sums:
                self.sums[name] = _nothing(name, x)
            _ADD[name](self.sums[name], x)
            if not _is_finite(name, self.sums[name]):
                raise NumericalError(
                    f"{self.site}: the inputs hold NaN or infinite numbers; use a wider dtype (float32) or other text"
                )
        self._factors.clear()
        self._complete = False

    def merge(self, other: "Statistics") -> "Statistics":
        """The statistics of both halves of a calibration set together."""
        if self.needs != other.needs:
            raise InvalidInput(f"{self.site}: statistics of different kinds cannot be merged")
        sums = {name: total + other.sums[name] for name, total in self.sums.items()}
        return Statistics(self.site, self.needs, self.sequences + other.sequences, self.tokens + other.tokens, sums)

    def with_gradients(self, gradients: Mapping[str, Tensor]) -> "Statistics":
        """The same sums, shared and not copied, with one projection's gradients: `GRADIENTS` or `REGIONAL`."""
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
    def regional_gradient_square(self) -> Tensor:
        """`[out, in]`: the mean over sequences of the squared gradient of the norm of the block's output."""
        return self._gradient(REGIONAL)

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
        total = self._sum("gram")
        if not self._complete:
            complete(total)
            self._complete = True
        return total

    @property
    def histogram(self) -> Tensor:
        """`[32768]`, int64: how many |x| share the upper 16 bits of a float32, so each bin is under 1 % wide."""
        return self._sum("histogram")

    def magnitude_at(self, share: float) -> float:
        """The |x| below which the given share of all inputs lies, in [0, 1], within 1 %; from the histogram."""
        counts = self.histogram.cumsum(0)
        rank = max(math.ceil(share * int(counts[-1])), 1)
        bin_ = int(torch.searchsorted(counts, rank))
        return float(torch.tensor(min(bin_, INFINITE - 1) << 16, dtype=torch.int32).view(torch.float32))

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
        hessian = self._sum("gram") * (2.0 / self.sequences)  # its upper triangle, which is all that is read
        dead = hessian.diagonal() == 0
        if bool(dead.all()):
            raise NumericalError(f"{self.site}: the Gram matrix is zero: no calibration token gave it an input")
        hessian.diagonal()[dead] = 1.0
        diagonal = hessian.diagonal().clone()
        strength = damping
        while True:
            hessian.diagonal().copy_(diagonal + strength * diagonal.mean())
            factor = factor_of_inverse(hessian)
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


def _nothing(name: str, x: Tensor) -> Tensor:
    """The sum over no inputs like x `[tokens, in]`."""
    if name == "histogram":
        return torch.zeros(MAGNITUDES, dtype=torch.int64, device=x.device)
    columns = x.shape[1]
    return torch.zeros((columns, columns) if name == "gram" else columns, device=x.device)


def _add_histogram(total: Tensor, x: Tensor) -> None:
    bins = x.abs().contiguous().view(torch.int32) >> 16
    total += torch.bincount(bins.flatten(), minlength=MAGNITUDES)


# Raw sums over tokens: how inputs x [tokens, in] in float32 are added to a total, in place.
_ADD: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda total, x: total.add_(x.sum(0)),  # [in]
    "sum_of_squares": lambda total, x: total.add_(x.square().sum(0)),  # [in]
    "gram": add_gram,  # [in, in], upper triangle
    "histogram": _add_histogram,  # [MAGNITUDES]
}


def _is_finite(name: str, total: Tensor) -> bool:
    """Whether all inputs were; one that is not, or too large to be squared, shows on a Gram matrix's diagonal."""
    if name == "histogram":
        return not bool(total[INFINITE:].any())
    return bool(torch.isfinite(total.diagonal() if name == "gram" else total).all())
