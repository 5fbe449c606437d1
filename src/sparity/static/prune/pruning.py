"""One pruning decision for one matrix: score, pattern and solver together."""

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparity import registry
from sparity.calibration import Statistics
from sparity.errors import InvalidInput, NumericalError, suggestion
from sparity.static.prune.compare_within import CompareWithin
from sparity.static.prune.patterns.base import Pattern, build_pattern
from sparity.static.prune.scores.base import Score
from sparity.static.prune.solvers.base import Solver

Spec = str | Mapping[str, Any]
DEFAULT_SCORE = "wanda"
DEFAULT_SPARSITY = 0.5
GROUPS = ("row", "layer", "global")


@dataclass(frozen=True)
class Pruning:
    """How a matrix is pruned. `sparsity` is the target that a budget shares out among matrices.

    With `across_layers` a threshold over all matrices does that.
    """

    score: Score
    pattern: Pattern
    solver: Solver
    compare_within: CompareWithin
    sparsity: float
    across_layers: bool = False

    @classmethod
    def of(
        cls,
        score: Spec | None = None,
        pattern: Spec = "unstructured",
        solver: Spec = "mask_only",
        sparsity: float | None = None,
        compare_within: str | None = None,
    ) -> "Pruning":
        """Build the parts from a recipe's values, with the methods' own defaults for what is left out.

        Raises:
            InvalidInput: unknown names or options, or a sparsity that is out of range or contradicts the pattern.
        """
        chosen_solver: Solver = registry.build("prune.solver", solver)
        default_score = chosen_solver.own_score or DEFAULT_SCORE
        chosen_score: Score = registry.build("prune.score", default_score if score is None else score)
        chosen_pattern = build_pattern(pattern)
        if isinstance(score, Mapping) and any(score.values()) and chosen_score.name == chosen_solver.own_score:
            raise InvalidInput(
                f"{chosen_solver.name} computes the score {chosen_score.name} by itself: give the options to "
                f"the solver, as `solver: {{{chosen_solver.name}: {{...}}}}`"
            )
        if chosen_solver.exchanges and not chosen_pattern.exchange_width(1):
            raise InvalidInput(
                f"{chosen_solver.name} lets single weights change places, which {chosen_pattern.words} do not allow: "
                "use unstructured or N:M, or another solver"
            )
        own = chosen_solver.compare_within if chosen_score.name == chosen_solver.own_score else None
        group = compare_within or own or chosen_score.compare_within
        if group not in GROUPS:
            raise InvalidInput(f"compare_within {group!r}{suggestion(str(group), GROUPS)} (use {' or '.join(GROUPS)})")
        asked = _sparsity(sparsity, chosen_pattern)
        if group != "global":
            return cls(chosen_score, chosen_pattern, chosen_solver, group, asked)  # type: ignore[arg-type]
        if chosen_pattern.sparsity is not None:
            raise InvalidInput(f"compare_within global: {chosen_pattern.words} leaves nothing to compare across layers")
        return cls(chosen_score, chosen_pattern, chosen_solver, "layer", asked, across_layers=True)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the score and the solver read."""
        score_needs = () if self._solver_scores else self.score.needs
        return frozenset(score_needs) | frozenset(self.solver.needs)

    @property
    def by_rows(self) -> bool:
        """Whether the solver alone reads the Gram matrix, and of its factor one row panel after the other."""
        return self.solver.by_rows and (self._solver_scores or "gram" not in self.score.needs)

    @property
    def dense_needs(self) -> frozenset[str]:
        """The statistics of the dense model that a threshold over all matrices reads."""
        return frozenset(self.score.needs) if self.across_layers else frozenset()

    @property
    def method(self) -> str:
        """Score and solver in words, such as "wanda + sparsegpt"."""
        solver = "" if self.solver.name == "mask_only" else f" + {self.solver.name}"
        return self.solver.name if self._solver_scores else f"{self.score.name}{solver}"

    @property
    def words(self) -> str:
        """The method in words, such as "wanda, 2 of 4 kept"."""
        name = self.method
        sparsity = "" if self.pattern.sparsity is not None else f", {self.sparsity:.0%}"
        group = ", one threshold" if self.across_layers else ""
        return f"{name}{sparsity}, {self.pattern.words}{group}"

    def apply(
        self, weight: Tensor, statistics: Statistics, sparsity: float, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prune `weight` [out, in] at the sparsity given.

        Zeros where `mask` (bool [out, in]) is False count among those that are pruned, and stay zero.

        Returns the new weight in the type of the old one, zero where pruned, and the mask (bool, True = kept).
        """
        if self._solver_scores:
            choose = _Choice(self, sparsity, within=mask)
        else:
            scores = self.score.score(weight, statistics)
            scores = scores if mask is None else scores.masked_fill(~mask, 0.0)
            keep = self.pattern.keep(scores, sparsity, self.compare_within)
            choose = _Choice(self, sparsity, keep if mask is None else keep & mask)
        solved, keep = self.solver.solve(weight, statistics, choose)
        pruned = solved.to(weight.dtype)
        if not bool(torch.isfinite(pruned).all()):
            raise NumericalError(
                f"{statistics.site}: {self.solver.name} gave NaN or infinite weights; raise its damping"
            )
        return pruned, keep

    @property
    def _solver_scores(self) -> bool:
        return self.solver.own_score == self.score.name


@dataclass(frozen=True)
class _Choice:
    """Answers a solver: from the fixed mask of a score, or by the pattern from the solver's own scores."""

    pruning: Pruning
    sparsity: float
    mask: Tensor | None = field(default=None, repr=False)
    within: Tensor | None = field(default=None, repr=False)  # where the solver's own scores may keep a weight

    @property
    def column_step(self) -> int | None:
        return None if self.mask is not None else self.pruning.pattern.column_step

    @property
    def column_multiple(self) -> int:
        return 1 if self.mask is not None else self.pruning.pattern.column_multiple

    @property
    def fixed(self) -> bool:
        return self.mask is not None

    def exchange_width(self, columns: int) -> int:
        return self.pruning.pattern.exchange_width(columns)

    def __call__(self, scores: Tensor, columns: slice) -> Tensor:
        if self.mask is not None:
            return self.mask[:, columns]
        pattern, group = self.pruning.pattern, self.pruning.compare_within
        if self.within is None:
            return pattern.keep(scores, self.sparsity, group)
        within = self.within[:, columns]
        return pattern.keep(scores.masked_fill(~within, 0.0), self.sparsity, group) & within


def _sparsity(given: Any, pattern: Pattern) -> float:
    if given is None:
        return DEFAULT_SPARSITY if pattern.sparsity is None else pattern.sparsity
    if isinstance(given, bool) or not isinstance(given, numbers.Real) or not 0 <= float(given) < 1:
        raise InvalidInput(f"sparsity {given!r}: it is the share of weights to remove and must lie in [0, 1)")
    if pattern.sparsity is not None and abs(float(given) - pattern.sparsity) > 1e-9:
        raise InvalidInput(
            f"sparsity {given} contradicts the pattern: {pattern.words} is {pattern.sparsity:g}; leave sparsity out"
        )
    return float(given)
