"""Knapsack: measure every site alone at every sparsity, then solve for the cheapest choice."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparity.budgets.base import (
    MeasuredBudget,
    Objective,
    Site,
    SiteGroup,
    grouped,
    no_worse_than_uniform,
    shift_to_sparsity,
)
from sparity.budgets.optimum.multiple_choice import multiple_choice
from sparity.errors import CorruptFile, InvalidInput, NumericalError
from sparity.files import expand, read_json_object
from sparity.registry import register

Saved = Callable[[Site, float], float]


@register("budget", "knapsack")
@dataclass(frozen=True)
class Knapsack(MeasuredBudget):
    """One sparsity per site so that the sum of the losses is least and what they give up is what is asked for.

    A multiple-choice knapsack, solved exactly (SciPy's HiGHS). Losses are taken to add up; the result is at least as
    good as the uniform budget on the sequences it was measured on. With `cost: bytes` the weights of a file that
    stores a bit per weight and the values that stay are to be as small as with the uniform budget: what stays dense
    saves its bits too, so the sparsity may be a little less; channels that are skipped at run time have no such bits.
    With `cost: milliseconds` a token is to take no longer than with the uniform budget, by the times of this machine's
    kernels; a site may stay dense. `table` is a
    `sensitivity.json` that `sparity sensitivity` wrote for the same model: nothing is measured then. The loss is
    measured on `samples` calibration sequences. `per: block` lets the matrices of a block move together,
    `per: role` those of the same name in all blocks. `separable: true` measures far less on a deep model: each role
    in all blocks at once, at every sparsity, and each block whole, at the sparsity asked for; a site's loss is taken to
    be its role's, times its block's share of what all blocks lose.
    """

    cost: Literal["parameters", "bytes", "milliseconds"] = "parameters"
    table: str | None = None
    separable: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.separable and (self.table is not None or self.per != "layer"):
            raise InvalidInput("knapsack: `separable` measures for layers: leave `table` and `per` out")

    @property
    def measures(self) -> bool:  # type: ignore[override]
        """Whether an objective is needed."""
        return self.table is None

    def allocate(self, sites: Sequence[Site], sparsity: float, objective: Objective | None = None) -> dict[str, float]:
        """See `Budget.allocate`."""
        groups = self.groups(sites)
        if sparsity == 0 or len(groups) == 1:
            return dict.fromkeys((site.name for site in sites), sparsity)
        if self.table is None:
            measure, candidates = self.objective_of(objective), self._candidates(sparsity)
            losses = (_separable if self.separable else _of_each)(groups, candidates, sparsity, measure)
        else:
            if self.per != "layer":
                raise InvalidInput(f"knapsack: a table holds layers; leave `per: {self.per}` out")
            groups, candidates, losses = _from_table(self.table, sites)
        chosen = _choose(groups, candidates, losses, self._goal(sites, sparsity), self._saved)
        allocation = {site.name: each for group, each in zip(groups, chosen, strict=True) for site in group.sites}
        if self.cost == "parameters":
            allocation = shift_to_sparsity(sites, [allocation[site.name] for site in sites], sparsity)
        return allocation if self.table is not None else no_worse_than_uniform(allocation, sites, sparsity, measure)

    def _candidates(self, sparsity: float) -> list[float]:
        """The sparsities to try; where time counts, dense is always one: its kernel is another."""
        found = self.candidates(sparsity)
        return [0.0, *found] if self.cost == "milliseconds" and found[0] > 0 else found

    def _saved(self, site: Site, sparsity: float) -> float:
        """What a site gives up: weights, time, or bytes less the bit per weight that says where they were."""
        if self.cost == "parameters":
            return site.cost * sparsity
        if self.cost == "milliseconds":
            if site.milliseconds is None:
                raise InvalidInput(f"knapsack: it is not known how long {site.name} takes: use `cost: parameters`")
            return site.milliseconds(0.0) - site.milliseconds(sparsity)
        mask = site.cost / 8 if site.mask else 0.0
        return site.bytes * sparsity - mask if sparsity else 0.0

    def _goal(self, sites: Sequence[Site], sparsity: float) -> float:
        return sum(self._saved(site, sparsity) for site in sites)


def _of_each(
    groups: Sequence[SiteGroup], candidates: Sequence[float], sparsity: float, measure: Objective
) -> list[list[float]]:
    """The loss of each group alone at each sparsity."""
    return [[measure(group.allocation(each)) if each else 0.0 for each in candidates] for group in groups]


def _separable(
    groups: Sequence[SiteGroup], candidates: Sequence[float], sparsity: float, measure: Objective
) -> list[list[float]]:
    """The losses of single sites, from those of whole roles and of whole blocks."""
    sites = [group.sites[0] for group in groups]
    roles, blocks = grouped(sites, lambda site: site.role), grouped(sites, lambda site: site.depth)
    of_role = {
        group.sites[0].role: losses
        for group, losses in zip(roles, _of_each(roles, candidates, sparsity, measure), strict=True)
    }
    of_block = {group.sites[0].depth: max(measure(group.allocation(sparsity)), 0.0) for group in blocks}
    within = {group.sites[0].role: sum(of_block[site.depth] for site in group.sites) for group in roles}
    shares = [of_block[site.depth] / within[site.role] if within[site.role] else 0.0 for site in sites]
    return [[loss * share for loss in of_role[site.role]] for site, share in zip(sites, shares, strict=True)]


def _choose(
    groups: Sequence[SiteGroup],
    candidates: Sequence[float],
    losses: Sequence[Sequence[float]],
    goal: float,
    saved: Saved,
) -> list[float]:
    """A sparsity for each group."""
    if not np.isfinite(np.array(losses, dtype=np.float64)).all():
        raise NumericalError("a measured loss is NaN or infinite: measure at a smaller spread")
    gains = [[sum(saved(site, each) for site in group.sites) for each in candidates] for group in groups]
    picks = multiple_choice(losses, gains, goal)
    if picks is None:
        raise InvalidInput(f"no choice of the sparsities {[round(each, 3) for each in candidates]} gives up enough")
    return [candidates[pick] for pick in picks]


def _from_table(path: str, sites: Sequence[Site]) -> tuple[list[SiteGroup], list[float], list[list[float]]]:
    """The groups that a `sensitivity.json` measured, sparsities, and their losses; nothing removed loses nothing."""
    if not expand(path).is_file():
        raise InvalidInput(f"table {path} does not exist: write one with `sparity sensitivity`")
    rows = read_json_object(expand(path)).get("rows")
    losses: dict[tuple[str, ...], dict[float, float]] = {}
    try:
        for row in rows:  # type: ignore[union-attr]
            if row["part"] == "layer":
                measured = losses.setdefault(tuple(map(str, row["projections"])), {0.0: 0.0})
                measured[_number(row, "sparsity")] = _number(row, "kl")
                if not 0 < row["sparsity"] < 1:
                    raise ValueError(f"sparsity {row['sparsity']}")
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise CorruptFile(f"{path} is no table of `sparity sensitivity` ({error!r})") from error
    candidates = sorted({each for measured in losses.values() for each in measured})
    by_name, groups, found = {site.name: site for site in sites}, [], []
    for names, measured in losses.items():
        members = tuple(by_name.pop(name) for name in names if name in by_name)
        if members:
            absent = [each for each in candidates if each not in measured]
            if absent:
                raise InvalidInput(f"{path} has no measurement of {names[0]} at sparsity {absent[0]:g}")
            groups.append(SiteGroup(members))
            found.append([measured[each] for each in candidates])
    if by_name:
        raise InvalidInput(f"{path} has no measurement of {next(iter(by_name))}: measure this model")
    return groups, candidates, found


def _number(row: Mapping[str, object], key: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} {value!r}")
    return float(value)
