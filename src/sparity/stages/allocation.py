"""How a stage shares out what it removes or skips: what a budget adds to its needs, and each projection's share.

The same for stages that edit weights and for those that act at run time:

    def needs(self):
        return with_budget(Needs(statistics=...), build_budget(self.budget))

    def decide(self, model, evidence):
        return {"sparsity": allocation_of(build_budget(self.budget), model, evidence, self.sparsity)}
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from sparity import registry
from sparity.budgets.base import Budget, Objective, Site, allocate
from sparity.models import Decoder, Projection
from sparity.sections import Spec
from sparity.stages.base import ModelEvidence, Needs


def build_budget(spec: Spec) -> Budget:
    """The budget of a recipe's value, `owl` or `{owl: {max_shift: 0.1}}`.

    Raises:
        InvalidInput: unknown name or options.
    """
    budget: Budget = registry.build("budget", spec)
    return budget


def with_budget(needs: Needs, budget: Budget) -> Needs:
    """What a stage needs when a budget shares out its sparsity.

    A budget that measures applies the stage to the model as the pass opens it, so what the stage reads of its blocks is
    read of that whole model too, more than once.
    """
    if not budget.measures:
        return replace(needs, decision=needs.decision | frozenset(budget.needs))
    return replace(
        needs,
        decision=needs.decision | frozenset(budget.needs) | needs.statistics | needs.gradients,
        repeated=True,
        trials=max(needs.trials, getattr(budget, "samples", sys.maxsize)),
    )


def files_of(budget: Budget) -> Mapping[str, str]:
    """Option -> file that a budget reads, such as the table of what was measured before: see `Stage.reads`."""
    table = getattr(budget, "table", None)
    return {"table": table} if table else {}


def projections(model: Decoder) -> Iterator[tuple[int, Projection]]:
    """The number of its block, and every projection; no weights in memory."""
    for index in range(len(model)):
        for site in model.sites(index):
            for projection in site.projections:
                yield index, projection


def sites_of(
    model: Decoder, chosen: Collection[str] | None = None, observed: Mapping[str, float] | None = None
) -> list[Site]:
    """What a budget shares the sparsity out among.

    Args:
        model: whose projections they are.
        chosen: the names of those that take part; None is all.
        observed: what the budget itself found there, by name.
    """
    found = observed or {}
    sites = []
    for index, projection in projections(model):
        if chosen is None or projection.name in chosen:
            size = float(projection.weight.numel())
            evidence = found.get(projection.name, 0.0)
            sites.append(Site(projection.name, size, index, evidence, size * model.dtype.itemsize))
    return sites


def allocation_of(
    budget: Budget,
    model: Decoder,
    evidence: ModelEvidence | None,
    sparsity: float,
    *,
    fixed: Mapping[str, float] | None = None,
    chosen: Collection[str] | None = None,
) -> dict[str, float]:
    """Projection -> its share, so that the mean over all that take part, weighted by size, is `sparsity`.

    Args:
        budget: who decides.
        model: as the pass opens it.
        evidence: what is known of it; without it, in a draft, uniform stands in for a budget that rests on data.
        sparsity: the mean share, in [0, 1).
        fixed: name or glob -> a share that is not the budget's to choose.
        chosen: the names of the projections that take part; None is all. Others are not in the result.

    Raises:
        InvalidInput: a glob that matches nothing, a share outside [0, 1), or a mean that the rest cannot reach.
    """
    observed: Mapping[str, float] = {}
    objective: Objective | None = None
    if evidence is None:
        budget = build_budget("uniform") if budget.needs or budget.measures else budget
    else:
        observed = _observed(budget, evidence, chosen) if budget.needs else {}
        objective = _objective(evidence) if budget.measures else None
    return allocate(budget, sites_of(model, chosen, observed), sparsity, fixed or {}, objective)


def _objective(evidence: ModelEvidence) -> Objective:
    return lambda allocation: evidence.trial({"sparsity": dict(allocation)})


def _observed(budget: Budget, evidence: ModelEvidence, chosen: Collection[str] | None) -> dict[str, float]:
    """What a budget finds in the blocks."""
    found: dict[str, float] = {}
    for known in evidence.blocks():
        weights, inputs = {}, {}
        for site, statistics in known.sites():
            for projection in site.projections:
                if chosen is None or projection.name in chosen:
                    weights[projection.name], inputs[projection.name] = projection.weight, statistics.only(budget.needs)
        if weights:
            found.update(budget.observe(weights, inputs))
    return found
