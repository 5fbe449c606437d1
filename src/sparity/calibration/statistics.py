"""What calibration learns about the input of a projection: raw sums that merge, and what follows from them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparity import registry
from sparity.calibration.input_statistics.base import statistic
from sparity.calibration.input_statistics.gram import diagonal_of
from sparity.calibration.input_statistics.histogram import magnitude_at
from sparity.calibration.inverse_factor import PANEL, factor_of_inverse
from sparity.calibration.mapped import release
from sparity.errors import InvalidInput, NumericalError, suggestion
from sparity.memory import give_back
from sparity.visible import logger

log = logger(__name__)

# Statistics of a projection's own gradient [out, in] over sequences: of the loss its mean and the mean of its squares,
# of the norm of the block's output the mean of its squares. Of the gradient of the loss at its output, over tokens, the
# mean of g gT [out, out].
WEIGHT_GRADIENTS = ("gradient", "gradient_square")
OUTPUT_GRAM = "output_gradient_gram"
GRADIENTS = (*WEIGHT_GRADIENTS, OUTPUT_GRAM)
REGIONAL = "regional_gradient_square"

DAMPING = 0.01  # share of the mean diagonal that is added to it before a factorisation
MAX_DAMPING = 1.0
WEAKEST = torch.finfo(torch.float32).tiny  # of the Hessian's diagonal: less has no inverse in float32


@dataclass
class Statistics:
    """Raw sums over the inputs of one or more projections, and perhaps the gradients of one of them.

    `statistics["NAME"]` is what a method asked for in its `needs`; the properties are the names that Sparity brings.

    Args:
        site: the name used in messages.
        needs: the statistics to gather, plug-ins of the kind `statistic`.
        sums: their raw sums by name, none before the first input.
        gradients: those of `GRADIENTS` and `REGIONAL` that are known, `[out, in]`, or `[out, out]` of an output.
        room: gives zeros `[in, in]`, float32, for a factor of so many columns, where memory has no place for it.
    """

    site: str
    needs: frozenset[str]
    sequences: int = 0
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    room: Callable[[int], Tensor] | None = field(default=None, repr=False)
    _factors: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _ready: set[str] = field(default_factory=set, repr=False)  # the sums that were made ready in place

    @classmethod
    def gather(cls, site: str, needs: Iterable[str]) -> "Statistics":
        """An empty collection for the given statistics.

        Raises:
            InvalidInput: an unknown statistic.
        """
        wanted, known = frozenset(needs), registry.names("statistic")
        if unknown := sorted(wanted - set(known)):
            close = suggestion(unknown[0], known)
            raise InvalidInput(f"unknown statistics {unknown}{close} (known: {', '.join(known)})")
        return cls(site, wanted)

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
        for name in sorted(self.needs):
            counted = statistic(name)
            if name not in self.sums:
                self.sums[name] = counted.empty(x.shape[1], x.device)
            counted.add(self.sums[name], x)
            if not counted.is_finite(self.sums[name]):
                raise NumericalError(not_finite(self.site))
        self._factors.clear()
        self._ready.clear()

    def merge(self, other: "Statistics") -> "Statistics":
        """The statistics of both halves of a calibration set together."""
        if self.needs != other.needs:
            raise InvalidInput(f"{self.site}: statistics of different kinds cannot be merged")
        both = self.sums.keys() & other.sums.keys()  # a half that no token reached has none
        sums = {
            name: statistic(name).merge(total, other.sums[name]) if name in both else total.clone()
            for name, total in (other.sums | self.sums).items()
        }
        return Statistics(self.site, self.needs, self.sequences + other.sequences, self.tokens + other.tokens, sums)

    def with_gradients(self, gradients: Mapping[str, Tensor]) -> "Statistics":
        """The same sums, shared and not copied, with one projection's gradients: `GRADIENTS` or `REGIONAL`."""
        return replace(self, gradients=gradients)

    def only(self, needs: Iterable[str]) -> "Statistics":
        """Those of the same sums and gradients, shared and not copied, that a method asked for."""
        wanted = frozenset(needs)
        sums = {name: total for name, total in self.sums.items() if name in wanted}
        gradients = {name: gradient for name, gradient in self.gradients.items() if name in wanted}
        return replace(self, needs=self.needs & wanted, sums=sums, gradients=gradients)

    def __getitem__(self, name: str) -> Tensor:
        """The value of a statistic of the inputs, or of a gradient.

        Raises:
            InvalidInput: it was not gathered.
            NumericalError: no calibration token reached the site.
        """
        if name in (*GRADIENTS, REGIONAL):
            return self._gradient(name)
        total = self._sum(name)
        if name in self._ready:
            return total
        value = statistic(name).value(total, self.sequences, self.tokens)
        if value is total:
            self._ready.add(name)
        return value

    @property
    def gradient(self) -> Tensor:
        """`[out, in]`: the mean over sequences of the gradient of a sequence's loss."""
        return self["gradient"]

    @property
    def gradient_square(self) -> Tensor:
        """`[out, in]`: the mean over sequences of the squared gradient."""
        return self["gradient_square"]

    @property
    def regional_gradient_square(self) -> Tensor:
        """`[out, in]`: the mean over sequences of the squared gradient of the norm of the block's output."""
        return self[REGIONAL]

    @property
    def output_gradient_gram(self) -> Tensor:
        """`[out, out]`: the mean over tokens of g gT, g the gradient of a sequence's summed loss at the output."""
        return self[OUTPUT_GRAM]

    @property
    def column_norm(self) -> Tensor:
        """`[in]`: the norm of each input channel, sqrt(sum of squares / sequences)."""
        return self["column_norm"]

    @property
    def mean(self) -> Tensor:
        """`[in]`: the mean of each input channel over tokens."""
        return self["mean"]

    @property
    def gram(self) -> Tensor:
        """`[in, in]`: the sum of x xT over tokens."""
        return self["gram"]

    @property
    def histogram(self) -> Tensor:
        """`[32768]`, int64: how many |x| share the upper 16 bits of a float32, so each bin is under 1 % wide."""
        return self["histogram"]

    @property
    def silent(self) -> bool:
        """Whether tokens reached the site and all of its inputs were zero, as far as its statistics can tell."""
        return self.tokens > 0 and any(statistic(name).is_silent(total) for name, total in self.sums.items())

    @property
    def without_effect(self) -> bool:
        """Whether gradients are known and one of them is zero throughout."""
        return any(not bool(gradient.any()) for gradient in self.gradients.values())

    def magnitude_at(self, share: float) -> float:
        """The |x| below which the given share of all inputs lies, in [0, 1], within 1 %; from the histogram."""
        return magnitude_at(self.histogram, share)

    @property
    def hessian(self) -> Tensor:
        """`[in, in]`: 2/sequences times the Gram matrix, the layer's Hessian in SparseGPT's scale."""
        return self.gram * (2.0 / self.sequences)

    def inverse_factor(self, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
        """The upper Cholesky factor `[in, in]` of the inverse damped Hessian, and the dead channels `[in]`.

        The squared diagonal entry j is the j-th entry of the inverse Hessian of the channels from j on. A channel
        that never fired, or too weakly for float32 to invert its entry, counts as dead: the row and column of an
        identity take the place of its own. All may be dead. When the matrix cannot be factorised the damping is raised,
        at least doubled each time, up to 1, and the step is logged.

        Raises:
            NumericalError: no token reached the site, or no damping up to 1 makes the matrix definite.
        """
        if damping not in self._factors:
            self._factors[damping] = self._factorise(damping)
        return self._factors[damping]

    def _factorise(self, damping: float) -> tuple[Tensor, Tensor]:
        strength = damping
        while True:
            hessian, dead = self._damped(strength)
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

    def _damped(self, strength: float) -> tuple[Tensor, Tensor]:
        """The upper panels `[in, in]` of the damped Hessian, and the dead channels `[in]`."""
        total, scale = self._sum("gram"), 2.0 / self.sequences
        width = len(total)
        hessian = total.new_zeros(width, width) if self.room is None else self.room(width)
        diagonal = diagonal_of(total) * scale
        dead = diagonal < WEAKEST
        diagonal[dead] = 1.0
        damped = diagonal + strength * diagonal.mean()
        for start in range(0, width, PANEL):
            rows = slice(start, start + PANEL)
            panel = total[rows, start:] * scale
            panel[dead[rows]] = 0.0
            panel[:, dead[start:]] = 0.0
            panel.diagonal().copy_(damped[rows])
            hessian[rows, start:] = panel
            release(total[rows])
            release(hessian[rows])
        give_back()
        return hessian, dead

    def _gradient(self, name: str) -> Tensor:
        if name not in self.gradients:
            raise InvalidInput(f'{self.site}: the statistic "{name}" was not gathered; declare it in `needs`')
        return self.gradients[name]

    def _sum(self, name: str) -> Tensor:
        if name not in self.needs:
            raise InvalidInput(f'{self.site}: the statistic "{name}" was not gathered; declare it in `needs`')
        if not self.tokens:
            raise NumericalError(f"{self.site}: no calibration token reached it")
        return self.sums[name]


def not_finite(site: str) -> str:
    """What is said of inputs that cannot be counted."""
    return f"{site}: the inputs hold NaN or infinite numbers; use a wider dtype (float32) or other text"
