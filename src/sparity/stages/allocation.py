"""How a stage shares out what it removes or skips: what a budget adds to its needs, and each projection's share.

The same for stages that edit weights and for those that act at run time:

    def needs(self):
        return with_budget(Needs(statistics=...), build_budget(self.budget))

    def decide(self, model, evidence):
        return {"sparsity": allocation_of(build_budget(self.budget), sites_of(model), evidence, self.sparsity)}
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

from sparity import registry
from sparity.budgets.base import Budget, Objective, Site, allocate
from sparity.errors import InvalidInput, suggestion
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


def left_out(model: Decoder, globs: Collection[str]) -> frozenset[str]:
    """The projections that some of `globs` match.

    Raises:
        InvalidInput: one matches none.
    """
    return frozenset[str]().union(*(matched(model, glob, "dense") for glob in globs))


def matched(model: Decoder, glob: str, option: str) -> set[str]:
    """The projections that a glob matches, which an option of a stage gives.

    Raises:
        InvalidInput: it matches none.
    """
    names = [projection.name for _, projection in projections(model)]
    found = {name for name in names if fnmatchcase(name, glob)}
    if not found:
        raise InvalidInput(f'{option}: "{glob}" matches no projection{suggestion(glob, names)}')
    return found


def globs_of(chosen: Collection[str], names: Sequence[str]) -> list[str]:
    """The shortest list of globs that says which of `names` are chosen: one for a role that is chosen in all blocks.

    In the order of `names`. A glob has `*` for every number of a name.
    """
    wanted, found = frozenset(chosen), dict[str, None]()
    globs = {glob: frozenset(n for n in names if fnmatchcase(n, glob)) for glob in map(_without_numbers, names)}
    for name in names:
        if name in wanted:
            glob = _without_numbers(name)
            found[glob if globs[glob] <= wanted else name] = None
    return list(found)


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def sites_of(model: Decoder, milliseconds: Callable[[Projection, float], float] | None = None) -> list[Site]:
    """All projections, as a budget sees them.

    Args:
        model: whose projections they are.
        milliseconds: how long a projection's product with one token takes at a share, where the stage can tell.
    """
    sites = []
    for index, projection in projections(model):
        size = float(projection.weight.numel())
        clock = None if milliseconds is None else partial(milliseconds, projection)
        sites.append(Site(projection.name, size, index, 0.0, size * model.dtype.itemsize, clock))
    return sites


def allocation_of(
    budget: Budget,
    sites: Sequence[Site],
    evidence: ModelEvidence | None,
    sparsity: float,
    fixed: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Site -> its share, so that the mean over all sites, weighted by cost, is `sparsity`.

    Args:
        budget: who decides.
        sites: what takes part, each with the name of a projection: `sites_of(model)`, or some of them, or a run-time
            stage's own, named after the first projection that they save.
        evidence: what is known of the model; without it, in a draft, uniform stands in for a budget that rests on data.
        sparsity: the mean share, in [0, 1).
        fixed: name or glob -> a share that is not the budget's to choose.

    Raises:
        InvalidInput: a glob that matches nothing, a share outside [0, 1), or a mean that the rest cannot reach.
    """
    objective: Objective | None = None
    if evidence is None:
        budget = build_budget("uniform") if budget.needs or budget.observes or budget.measures else budget
    else:
        if budget.needs or budget.observes:
            observed = _observed(budget, evidence, {site.name for site in sites})
            sites = [replace(site, evidence=observed.get(site.name, 0.0)) for site in sites]
        objective = Measured(evidence) if budget.measures else None
    return allocate(budget, sites, sparsity, fixed or {}, objective)


@dataclass(frozen=True)
class Measured:
    """The objective of the budgets: what the evidence of a model measures."""

    evidence: ModelEvidence

    def __call__(self, allocation: Mapping[str, float], samples: int | None = None) -> float:
        """See `Objective`."""
        return self.evidence.trial({"sparsity": dict(allocation)}, samples)

    def block_error(self, block: int, allocation: Mapping[str, float], error: str = "token") -> float:
        """See `Objective.block_error`."""
        return self.evidence.block_error(block, {"sparsity": dict(allocation)}, error)


def _observed(budget: Budget, evidence: ModelEvidence, names: Collection[str]) -> dict[str, float]:
    """What a budget finds in the blocks, for the projections of these names."""
    found: dict[str, float] = {}
    for known in evidence.blocks():
        weights, inputs = {}, {}
        for site, statistics in known.sites():
            for projection in site.projections:
                if projection.name in names:
                    weights[projection.name], inputs[projection.name] = projection.weight, statistics.only(budget.needs)
        if weights:
            found.update(budget.observe(weights, inputs))
    return found
