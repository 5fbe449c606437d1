"""The sparsity of every projection: the recipe's target shared out by its budget."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from sparity import registry
from sparity.budgets.base import Budget, Objective, Site, allocate
from sparity.calibration import walk
from sparity.calibration.walk import Known
from sparity.errors import InvalidInput
from sparity.models import BlockInputs, Decoder
from sparity.recipe import Prune
from sparity.static.prune.global_threshold import GlobalThreshold, Scores
from sparity.static.prune.pruning import Pruning


def decide_targets(
    prune: Prune,
    pruning: Pruning,
    decoder: Decoder,
    evidence: Mapping[str, float] | None = None,
    scores: Scores | None = None,
    objective: Objective | None = None,
) -> dict[str, float]:
    """Projection -> fraction to remove.

    Without the evidence that the budget rests on, the objective that it measures, or the scores that a threshold over
    all matrices compares, the target itself stands in for what is not known yet.

    Raises:
        InvalidInput: the pattern does not fit a projection, or the target cannot be met.
    """
    if prune.true_sequential and prune.order == "independent":
        raise InvalidInput("true_sequential needs `order: sequential`: independent statistics see the dense model only")
    shapes, sites = {}, []
    for index in range(len(decoder)):
        for projection in (p for site in decoder.sites(index) for p in site.projections):
            rows, columns = shapes[projection.name] = projection.weight.shape
            found = (evidence or {}).get(projection.name, 0.0)
            size = float(rows * columns)
            sites.append(Site(projection.name, size, index, found, size * decoder.dtype.itemsize))
    budget: Budget = registry.build("budget", prune.budget)
    if pruning.across_layers and budget.name != "uniform":
        raise InvalidInput(
            f"compare_within global decides what each projection gives up: leave budget {budget.name} out"
        )
    if scores is not None:
        budget = GlobalThreshold(scores, pruning.pattern)
    if pruning.pattern.sparsity is None:
        ready = (evidence is not None or not budget.needs) and (objective is not None or not budget.measures)
        fixed = {**dict.fromkeys(prune.dense, 0.0), **prune.overrides}
        known = budget if ready else registry.build("budget", "uniform")
        targets = allocate(known, sites, pruning.sparsity, fixed, objective)
    else:
        targets = _fixed_pattern_targets(prune, pruning, budget, sites)
    for name, target in targets.items():
        if target > 0:
            rows, columns = shapes[name]
            pruning.pattern.check_shape(rows, columns, name)
    return targets


def observe(budget: Budget, decoder: Decoder, inputs: BlockInputs, known: Known | None) -> dict[str, float]:
    """The evidence of a budget: from statistics that are known, or from one pass over the dense model."""
    evidence: dict[str, float] = {}
    for step in walk(decoder, inputs, budget.needs, order="independent", known=known):
        weights, gathered = {}, {}
        for site, statistics in step.sites():
            for projection in site.projections:
                weights[projection.name], gathered[projection.name] = projection.weight, statistics.only(budget.needs)
        evidence.update(budget.observe(weights, gathered))
    return evidence


def _fixed_pattern_targets(prune: Prune, pruning: Pruning, budget: Budget, sites: Sequence[Site]) -> dict[str, float]:
    """N:M removes the same share wherever it is applied: projections can only be left dense."""
    uneven = {glob: share for glob, share in prune.overrides.items() if share not in (0, pruning.pattern.sparsity)}
    if uneven or budget.name != "uniform":
        what = f"overrides {uneven}" if uneven else f"budget {budget.name}"
        raise InvalidInput(
            f"{pruning.pattern.words} removes {pruning.sparsity:.0%} everywhere and cannot follow the {what}; list "
            "projections under `dense:`, or use the unstructured pattern"
        )
    fixed = {**dict.fromkeys(prune.dense, 0.0), **prune.overrides}
    allocate(budget, sites, 0.0, dict.fromkeys(fixed, 0.0))  # every glob must match
    dense = [glob for glob, share in fixed.items() if share == 0]
    named = {site.name for glob in dense for site in sites if fnmatchcase(site.name, glob)}
    if len(named) == len(sites):
        raise InvalidInput("every projection is to stay dense: nothing is left to prune")
    return {site.name: 0.0 if site.name in named else pruning.sparsity for site in sites}
