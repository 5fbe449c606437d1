"""The report of a search, from what it found."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparity.measure.data import machine
from sparity.measure.data.report import Quality
from sparity.measure.data.tune_report import Pair, TunedOption, TunedPoint, TunedUnit, TuneReport
from sparity.pipeline.run.job import Job
from sparity.pipeline.studies.tuning.costs import Goal, Prices, Whole
from sparity.pipeline.studies.tuning.limits import Limits
from sparity.pipeline.studies.tuning.losses import Losses
from sparity.pipeline.studies.tuning.menu import AS_IT_IS, Choice
from sparity.pipeline.studies.tuning.search import Point, Table
from sparity.pipeline.studies.tuning.units import Unit


@dataclass(frozen=True)
class Findings:
    """Everything that was measured before the answer was run."""

    units: Sequence[Unit]
    choices: Sequence[Choice]
    prices: Prices
    whole: Whole
    losses: Losses
    how: str
    table: Table
    points: Sequence[Point]
    pairs: Sequence[Pair]
    dense_perplexity: float
    calibration_tokens: int


def report_of(
    job: Job,
    goal: Goal,
    limits: Limits,
    found: Findings,
    picks: Sequence[int],
    recipe: Mapping[str, Any],
    outcome: tuple[float | None, Quality | None, str | None],
    begun: float,
) -> TuneReport:
    """The report; `outcome` is the gain, the quality and the verdict of the answer."""
    chosen = [found.table.names[place][pick] for place, pick in enumerate(picks)]
    text = job.texts[0]
    gain, quality, verdict = outcome
    return TuneReport(
        model=job.name,
        architecture=type(job.decoder.skeleton).__name__,
        goal=goal,
        limits=limits.words,
        how=found.how,
        calibration_tokens=found.calibration_tokens,
        text=text.name,
        tokens=len(text.ids) - len(text.ids) // text.window,
        dense_perplexity=found.dense_perplexity,
        choices=tuple(choice.name for choice in found.choices),
        units=tuple(_unit(unit, name, found) for unit, name in zip(found.units, chosen, strict=True)),
        options=tuple(_options(found)),
        points=tuple(_point(point, found, tuple(picks)) for point in found.points),
        pairs=tuple(found.pairs),
        gain=gain,
        quality=quality,
        verdict=verdict,
        recipe=recipe,
        seconds=time.perf_counter() - begun,
        machine=machine.describe(),
    )


def _unit(unit: Unit, name: str, found: Findings) -> TunedUnit:
    price, dense = found.prices[unit.name, name], found.prices[unit.name, AS_IT_IS]
    loss = found.losses[unit.name, name]
    return TunedUnit(unit.name, unit.block, unit.role, name, price.format, loss, price.cost, dense.cost)


def _options(found: Findings) -> list[TunedOption]:
    rows = []
    for role in dict.fromkeys(unit.role for unit in found.units):
        same = [unit for unit in found.units if unit.role == role]
        dense = sum(found.prices[unit.name, AS_IT_IS].cost for unit in same)
        for choice in found.choices:
            measured = [unit for unit in same if (unit.name, choice.name) in found.losses]
            if len(measured) == len(same):
                cost = sum(found.prices[unit.name, choice.name].cost for unit in same)
                loss = sum(found.losses[unit.name, choice.name] for unit in same)
                form = found.prices[same[0].name, choice.name].format
                rows.append(TunedOption(role, choice.name, form, loss, cost / dense if dense else 1.0))
    return rows


def _point(point: Point, found: Findings, picks: tuple[int, ...]) -> TunedPoint:
    change = point.measured.perplexity / found.dense_perplexity - 1
    gain = found.whole.gain(point.cost)
    return TunedPoint(gain, point.predicted, point.measured.kl, change, point.picks == picks)
