"""Prune: zeros by a score, in a pattern, shared out by a budget; a solver corrects what stays."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor

from sparity.budgets.base import Budget, allocate
from sparity.calibration.evidence import BlockEvidence, Order
from sparity.calibration.inverse_factor import factor_bytes
from sparity.calibration.output_gradients import check_outputs
from sparity.calibration.statistics import GRADIENTS, OUTPUT_GRAM
from sparity.errors import InvalidInput
from sparity.models import Block, Decoder
from sparity.registry import register
from sparity.sections import Number, Spec
from sparity.stages import BlockEdit, BlockStage, Change, Decision, Needs
from sparity.stages.allocation import (
    allocation_of,
    build_budget,
    files_of,
    globs_of,
    projections,
    sites_of,
    with_budget,
)
from sparity.stages.base import Estimate, ModelEvidence, Property, Workload
from sparity.stages.joining import alike, shares_of
from sparity.stages.kernel_time import kernel_milliseconds
from sparity.static.prune.global_threshold import GlobalThreshold
from sparity.static.prune.pruning import Pruning
from sparity.static.prune.rounds import Rounds, prune_in_rounds
from sparity.static.prune.unseen_experts import Treatment, is_unseen, treat
from sparity.visible import logger

log = logger(__name__)

FP32 = 4
WORKSPACE = 4  # float32 copies of the largest matrix alive at once: weight, scores, their copy in order, mask, result
SOLVER_WORKSPACE = 4  # float32 copies of the largest Gram matrix: Hessian, damped, factor, its inverse
PER_WEIGHT = 50.0  # operations: scoring, ranking and reading it


@register("stage", "prune")
class Prune(BlockStage):
    """Zeros by a score, in a pattern; the solver corrects what stays."""

    preserves: ClassVar[frozenset[Property]] = frozenset({"mask", "shapes", "tokens"})

    score: Spec | None = Field(None, description="how much a weight matters; default: the solver's own, else wanda")
    pattern: Spec = Field("unstructured", description="unstructured, N:M (N kept of M), block:ROWSxCOLUMNS")
    sparsity: Number | None = Field(None, description="share of weights to remove, in [0, 1); default 0.5")
    budget: Spec = Field("uniform", description="how the sparsity is shared out among projections")
    solver: Spec = Field("mask_only", description="how the weights that stay make up for those that go")
    compare_within: Literal["row", "layer", "global"] | None = Field(
        None, description="the group in which scores compete"
    )
    order: Order = Field("sequential", description="statistics after the pruned blocks, or of the model before pruning")
    true_sequential: bool = Field(False, description="also after the pruned projections of the same block")
    overrides: dict[str, Number] = Field(default_factory=dict, description="glob of projections -> its own sparsity")
    unseen_expert: Treatment = Field("error", description="how an expert that saw no calibration token is treated")
    dense: list[str] = Field(default_factory=list, description="globs of projections that stay dense")
    rounds: Rounds | None = Field(None, description="train each block between two prunings: count, rate, samples")

    @property
    def apart(self) -> bool:  # type: ignore[override]
        """Rounds train a whole block."""
        return self.rounds is None

    @property
    def pruning(self) -> Pruning:
        """Score, pattern and solver, built anew.

        Raises:
            InvalidInput: unknown names or options, or a sparsity that is out of range or contradicts the pattern.
        """
        return Pruning.of(self.score, self.pattern, self.solver, self.sparsity, self.compare_within)

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        return self.pruning.words

    @property
    def how(self) -> str:
        """See `Stage.how`."""
        return self.pruning.method

    @property
    def zeros_lie(self) -> str | None:
        """See `Stage.zeros_lie`."""
        return self.pruning.pattern.words

    @property
    def only_sparsity(self) -> float | None:
        """That of an N:M pattern."""
        return self.pruning.pattern.sparsity

    @property
    def gram_by_rows(self) -> bool:
        """See `Stage.gram_by_rows`."""
        return self.pruning.by_rows

    @property
    def relies_on(self) -> frozenset[Property]:
        """Zeros must stay, and shapes too where the pattern counts columns."""
        unstructured = self.pruning.pattern.name == "unstructured"
        return frozenset({"mask"}) if unstructured else frozenset({"mask", "shapes"})

    def needs(self) -> Needs:
        """See `Stage.needs`."""
        pruning = self.pruning
        gradients = pruning.needs & frozenset(GRADIENTS)
        own = Needs(
            statistics=pruning.needs - gradients,
            gradients=gradients,
            decision=pruning.dense_needs,
            repeated=pruning.across_layers,
            sequences=self.rounds is not None,
            order=self.order,
            true_sequential=self.true_sequential,
        )
        return with_budget(own, build_budget(self.budget))

    def reads(self) -> Mapping[str, str]:
        """The table of a budget that was measured before."""
        return files_of(build_budget(self.budget))

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """The sparsity of every projection: `{"sparsity": {projection: share to remove}}`."""
        if self.true_sequential and self.order == "independent":
            raise InvalidInput(
                "true_sequential needs `order: sequential`: independent statistics see the dense model only"
            )
        if self.rounds is not None and self.order == "independent":
            raise InvalidInput("rounds need `order: sequential`: they train a block on what pruned ones before it give")
        pruning, budget = self.pruning, build_budget(self.budget)
        if OUTPUT_GRAM in pruning.needs:
            check_outputs(model)
        if pruning.across_layers and budget.name != "uniform":
            raise InvalidInput(
                f"compare_within global decides what each projection gives up: leave budget {budget.name} out"
            )
        if pruning.across_layers and evidence is not None:
            budget = GlobalThreshold(partial(self._scores, pruning, evidence), pruning.pattern)
        if pruning.pattern.sparsity is None:
            sites = sites_of(model, kernel_milliseconds)
            allocation = allocation_of(budget, sites, evidence, pruning.sparsity, self._fixed)
        else:
            allocation = self._allocation_of_fixed_pattern(pruning, budget, model)
        for _, projection in projections(model):
            if allocation[projection.name] > 0:
                rows, columns = projection.weight.shape
                pruning.pattern.check_shape(rows, columns, projection.name)
        return {"sparsity": allocation}

    @classmethod
    def joined(cls, model: Decoder, each: Mapping[str, Self]) -> Sequence[Self]:
        """See `Stage.joined`: one for each pattern, solver and so on; every projection's sparsity is an override."""
        found, names = list[Self](), {site.name: site.cost for site in sites_of(model)}
        for options, members in alike(each):
            shares = {name: stage.pruning.sparsity for name, stage in members.items()}
            if next(iter(members.values())).only_sparsity is None:
                found.append(cls(**{**options, **shares_of(shares, names)}))
            else:
                rest = [name for name in names if name not in members]
                found.append(cls(**{**options, "dense": globs_of(rest, list(names))}))
        return found

    def edit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> BlockEdit:
        """See `BlockStage.edit`; what is tried before anything is decided is pruned at once."""
        prune = partial(self._edited, decision)
        idle = all(decision["sparsity"].get(each.name, 0.0) == 0 for each in evidence.block.projections)
        if self.rounds is None or evidence.region is None or idle:
            return prune(evidence)
        return prune_in_rounds(self.rounds, evidence, evidence.region, prune)

    def _edited(self, decision: Decision, evidence: BlockEvidence) -> BlockEdit:
        """A block pruned in place."""
        pruning, changes, notes = self.pruning, list[Change](), list[str]()
        for site, statistics in evidence.sites():
            without_effect = []
            for projection in site.projections:
                sparsity = decision["sparsity"].get(projection.name, 0.0)
                if sparsity > 0:
                    known = evidence.of(projection, statistics)
                    mask = evidence.masks.get(projection.name)
                    if is_unseen(evidence, projection, known):
                        pruned = treat(self.unseen_expert, pruning, projection, known, sparsity, mask)
                    else:
                        pruned, _ = pruning.apply(projection.weight.clone(), known, sparsity, mask)
                    projection.write(pruned)
                    if known.silent or known.without_effect:
                        without_effect.append(projection.name)
                changes.append(Change.of(self.name, projection, evidence.block.index, target=sparsity))
            if without_effect:
                which = "every input" if statistics.silent else "the gradient"
                notes.append(
                    f"{', '.join(without_effect)}: {which} is zero on all calibration tokens: its weights go first"
                )
        return BlockEdit(evidence.block, tuple(changes), notes=tuple(notes))

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        pruning, changes = self.pruning, []
        solving, largest, largest_input, largest_output = 0.0, 0, 0, 0
        for index, projection in projections(model):
            rows, columns = projection.weight.shape
            sparsity = decision["sparsity"].get(projection.name, 0.0)
            changes.append(Change.planned(self.name, projection, index, sparsity, target=sparsity))
            largest, largest_input = max(largest, rows * columns), max(largest_input, columns)
            largest_output = max(largest_output, rows)
            solving += 2.0 * rows * columns**2
        solves = "gram" in pruning.needs
        if solves and pruning.by_rows:
            solver = factor_bytes(largest_input, work.in_files)
        else:
            solver = largest_input**2 * FP32 * SOLVER_WORKSPACE if solves else 0
            solver += largest_output**2 * FP32 * SOLVER_WORKSPACE if OUTPUT_GRAM in pruning.needs else 0
        flops = PER_WEIGHT * sum(change.size for change in changes) + (solving if solves else 0.0)
        memory = {"solver": solver, "scores and mask": largest * FP32 * WORKSPACE}
        if self.rounds is not None:
            weights = [sum(change.size for change in changes if change.block == index) for index in range(len(model))]
            flops += self.rounds.flops(sum(weights), work)
            memory["rounds"] = self.rounds.memory(max(weights, default=0))
        return Estimate(changes=tuple(changes), flops=flops, memory=memory)

    def verify(self, block: Block, decision: Decision) -> list[str]:
        """Groups that break the pattern."""
        pattern, problems = self.pruning.pattern, []
        for projection in block.projections:
            if decision["sparsity"].get(projection.name, 0) > 0:
                breaches = pattern.breaches(projection.weight != 0)
                if breaches:
                    problems.append(f"{projection.name}: {breaches} groups break the pattern ({pattern.words})")
        return problems

    @property
    def _fixed(self) -> dict[str, float]:
        """Name or glob -> its own sparsity."""
        return {**dict.fromkeys(self.dense, 0.0), **self.overrides}

    def _scores(self, pruning: Pruning, evidence: ModelEvidence) -> Iterator[tuple[str, Tensor]]:
        """Every projection with its scores; an expert that saw no token has none."""
        for known in evidence.blocks():
            for site, statistics in known.sites():
                for projection in site.projections:
                    if statistics.tokens or not statistics.needs:
                        yield projection.name, pruning.score.score(projection.weight, known.of(projection, statistics))

    def _allocation_of_fixed_pattern(self, pruning: Pruning, budget: Budget, model: Decoder) -> dict[str, float]:
        """N:M removes the same share wherever it is applied: projections can only be left dense."""
        pattern, sites, fixed = pruning.pattern, sites_of(model), self._fixed
        uneven = {glob: chosen for glob, chosen in self.overrides.items() if chosen not in (0, pattern.sparsity)}
        if uneven or budget.name != "uniform":
            what = f"overrides {uneven}" if uneven else f"budget {budget.name}"
            raise InvalidInput(
                f"{pattern.words} removes {pruning.sparsity:.0%} everywhere and cannot follow the {what}; list "
                "projections under `dense:`, or use the unstructured pattern"
            )
        allocate(budget, sites, 0.0, dict.fromkeys(fixed, 0.0))  # every glob must match
        dense = [glob for glob, chosen in fixed.items() if chosen == 0]
        named = {site.name for glob in dense for site in sites if fnmatchcase(site.name, glob)}
        if len(named) == len(sites):
            raise InvalidInput("every projection is to stay dense: nothing is left to prune")
        return {site.name: 0.0 if site.name in named else pruning.sparsity for site in sites}
