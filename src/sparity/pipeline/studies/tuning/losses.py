"""What every choice loses at every unit, measured: each alone, or roles and blocks where that would take too long."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sparity.pipeline.studies.tuning.costs import Prices
from sparity.pipeline.studies.tuning.menu import AS_IT_IS, Choice
from sparity.pipeline.studies.tuning.units import Unit
from sparity.stages.trials import Trial, Trials

Measure = Literal["auto", "each", "separable"]
Losses = dict[tuple[str, str], float]  # nats per token, by unit and choice
Picks = Mapping[str, str]  # unit -> choice
SHARE_OF_A_WHOLE = 0.6  # of the time of a trial of all blocks that a trial of one takes on average, with the head


def together(trials: Trials, units: Sequence[Unit], picks: Picks) -> Trial:
    """The model with a choice at each of some units."""
    changed = {
        projection: picks[unit.name]
        for unit in units
        if picks.get(unit.name, AS_IT_IS) != AS_IT_IS
        for projection in unit.projections
    }
    return trials.measure({"sparsity": changed})


def worthwhile(units: Sequence[Unit], choices: Sequence[Choice], prices: Prices) -> dict[str, list[Choice]]:
    """By unit, the choices to measure: those for which no gentler one is as cheap.

    A choice is gentler than another where on each axis it has the same label, or leaves everything as it is.
    """
    found = {}
    for unit in units:
        able = [choice for choice in choices if (unit.name, choice.name) in prices]
        cost = {choice.name: prices[unit.name, choice.name].cost for choice in able}
        found[unit.name] = [
            choice
            for choice in able
            if not any(_gentler(other, choice, choices[0]) and cost[other.name] <= cost[choice.name] for other in able)
        ]
    return found


def _gentler(one: Choice, other: Choice, nothing: Choice) -> bool:
    pairs = zip(one.labels, other.labels, nothing.labels, strict=True)
    return one != other and all(mine in (theirs, first) for mine, theirs, first in pairs)


@dataclass(frozen=True)
class Measurer:
    """Measures losses by trials; `tell` is told how many are done of how many, and the seconds of the last one."""

    trials: Trials
    units: Sequence[Unit]
    options: Mapping[str, Sequence[Choice]]  # by unit, with the one that changes nothing
    tell: Callable[[int, int, float], None]

    def how(self, measure: Measure, minutes: float) -> Literal["each", "separable"]:
        """Whether each unit is measured alone: asked for, or done within about so many minutes."""
        if measure != "auto":
            return measure
        first = {unit.name: self.options[unit.name][-1].name for unit in self.units}
        together(self.trials, self.units, {})  # sets everything up
        begun = time.perf_counter()
        together(self.trials, self.units[:1], first)
        seconds = (time.perf_counter() - begun) * SHARE_OF_A_WHOLE
        count = sum(len(options) - 1 for options in self.options.values())
        return "each" if count * seconds <= 60 * minutes else "separable"

    def each(self) -> Losses:
        """The loss of every choice at every unit alone."""
        found, total = Losses(), sum(len(options) for options in self.options.values())
        for unit in self.units:
            for choice in self.options[unit.name]:
                found[unit.name, choice.name] = self._loss([unit], choice, len(found) + 1, total)
        return found

    def separable(self) -> Losses:
        """Estimates from roles and blocks.

        A choice at a unit loses what it does in all blocks that have the unit's role, times the unit's block's share of
        what these blocks lose with a reference; choices that skip inputs have a reference of their own.
        """
        roles: dict[str, list[Unit]] = {}
        blocks: dict[int, list[Unit]] = {}
        for unit in self.units:
            roles.setdefault(unit.role, []).append(unit)
            blocks.setdefault(unit.block, []).append(unit)
        names = dict.fromkeys(choice.name for options in self.options.values() for choice in options)
        by_name = {choice.name: choice for options in self.options.values() for choice in options}
        total = sum(len(self._offered(same)) for same in roles.values()) + 2 * len(blocks)
        done, of_role = 0, dict[tuple[str, str], float]()
        for role, same in roles.items():
            for choice in self._offered(same):
                done += 1
                of_role[role, choice.name] = self._loss(same, choice, done, total)
        found = Losses()
        for skipping in (False, True):
            kind = [name for name in names if name != AS_IT_IS and bool(by_name[name].skips) == skipping]
            if not kind:
                continue
            sums = {name: sum(of_role.get((role, name), 0.0) for role in roles) for name in kind}
            reference = by_name[sorted(kind, key=lambda name: sums[name])[len(kind) // 2]]
            of_block = {}
            for block, same in blocks.items():
                done += 1
                of_block[block] = self._loss(same, reference, done, total)
            for unit in self.units:
                within = sum(of_block[other.block] for other in roles[unit.role])
                for choice in self.options[unit.name]:
                    if choice.name in kind:
                        share = of_block[unit.block] / within if within else 1 / len(roles[unit.role])
                        found[unit.name, choice.name] = of_role[unit.role, choice.name] * share
        return {**found, **{(unit.name, AS_IT_IS): 0.0 for unit in self.units}}

    def _offered(self, same: Sequence[Unit]) -> list[Choice]:
        return list(dict.fromkeys(choice for unit in same for choice in self.options[unit.name]))

    def _loss(self, same: Sequence[Unit], choice: Choice, done: int, total: int) -> float:
        begun = time.perf_counter()
        found = together(self.trials, same, dict.fromkeys((unit.name for unit in same), choice.name))
        self.tell(done, total, time.perf_counter() - begun)
        return max(found.kl, 0.0)
