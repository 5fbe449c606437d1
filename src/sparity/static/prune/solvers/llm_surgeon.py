"""LLM Surgeon: optimal brain surgeon of the loss itself, its Fisher a Kronecker product (van der Ouderaa et al. 2024).

arXiv:2312.17244.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparity.calibration import Statistics
from sparity.calibration.statistics import DAMPING
from sparity.errors import InvalidInput
from sparity.registry import register
from sparity.static.prune.kronecker_quadratic import OUTPUT_DAMPING, STATISTICS, KroneckerQuadratic, check_dampings
from sparity.static.prune.solvers.base import Choose, Solver


@register("prune.solver", "llm_surgeon")
@dataclass(frozen=True)
class LLMSurgeon(Solver):
    """Remove the weights that cost the loss least, and put the others where it is least, correlated across rows too.

    The curvature is the Fisher information as a Kronecker product of inputs and of gradients at outputs. `damping` and
    `output_damping` are the shares of their mean diagonals that are added to them; `refinements` is the number of steps
    of conjugate gradients towards the best weights. One call is one shot: several are several stages of growing
    sparsity, each with curvature of its own.
    """

    damping: float = DAMPING
    output_damping: float = OUTPUT_DAMPING
    refinements: int = 50

    needs: ClassVar[tuple[str, ...]] = STATISTICS
    own_score: ClassVar[str | None] = "llm_surgeon"

    def __post_init__(self) -> None:
        check_dampings(self.damping, self.output_damping)
        if self.refinements < 1:
            raise InvalidInput(f"refinements {self.refinements}: it takes at least 1, or the score llm_surgeon alone")

    def solve(self, weight: Tensor, statistics: Statistics, choose: Choose) -> tuple[Tensor, Tensor]:
        """See `Solver.solve`."""
        quadratic = KroneckerQuadratic.of(statistics, self.damping, self.output_damping)
        keep = choose(quadratic.costs(weight), slice(0, weight.shape[1]))
        return quadratic.refitted(weight, keep, self.refinements), keep
