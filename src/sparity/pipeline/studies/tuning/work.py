"""The work of a search: prices, losses, choices of everything, and measured runs of the best of them."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sparity.calibration.evidence import no_evidence
from sparity.files import make_folder
from sparity.measure.data.report import Candidate, Quality
from sparity.measure.data.tune_report import Pair, TuneReport
from sparity.measure.show import numbers
from sparity.models.loading import load_tokenizer
from sparity.pipeline.evidence.dense_statistics import dense_statistics, with_small
from sparity.pipeline.evidence.model_evidence import stored_evidence
from sparity.pipeline.run.job import Job
from sparity.pipeline.run.progress import Progress
from sparity.pipeline.run.run_folder import RunFolder
from sparity.pipeline.run.runner import execute
from sparity.pipeline.run.tokens import calibration_tokens
from sparity.pipeline.studies.tuning.answer import recipe_of
from sparity.pipeline.studies.tuning.applied_choices import AppliedChoices
from sparity.pipeline.studies.tuning.costs import Prices, Whole, prices, whole_of
from sparity.pipeline.studies.tuning.losses import Measurer, together, worthwhile
from sparity.pipeline.studies.tuning.menu import AS_IT_IS, Choice
from sparity.pipeline.studies.tuning.pairs import measured_pairs
from sparity.pipeline.studies.tuning.reporting import Findings, report_of
from sparity.pipeline.studies.tuning.search import Point, Table, best, front
from sparity.pipeline.studies.tuning.settings import Tuning
from sparity.pipeline.studies.tuning.units import Unit
from sparity.recipe import Recipe
from sparity.stages.trials import Trial, Trials

LOOSE = 0.9  # of the limit: a run that uses less of it leaves something to be had
MARGIN = 0.95  # of the limit that a further run aims at; a power of it after several that missed
STRETCH = 1.5  # times the predicted loss that a further run may try
MODEL = "model"  # the folder of the answer

Outcome = tuple[float | None, Quality | None, str | None]  # gain, quality, what is not met


class _Memory:
    """A part of a run's folder, for trials beside others."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        self._folder, self._name = folder, name
        self.state = folder.state / name
        make_folder(self.state)

    def remember(self, name: str, value: dict[str, Any]) -> None:
        self._folder.remember(f"{self._name}-{name}", value)

    def recall(self, name: str) -> dict[str, Any] | None:
        return self._folder.recall(f"{self._name}-{name}")


@dataclass(frozen=True)
class Study:
    """One search."""

    base: Mapping[str, Any]
    asked: Tuning
    job: Job
    choices: Sequence[Choice]
    units: Sequence[Unit]
    folder: RunFolder
    progress: Progress

    def run(self, begun: float) -> TuneReport:
        """Measure, choose, run, report."""
        job, folder, progress = self.job, self.folder, self.progress
        needs = frozenset[str]().union(*(s.needs().statistics for choice in self.choices for s in choice.stages))
        path = job.store or folder.state / "statistics"
        store = dense_statistics(job.opened, with_small(needs), path, progress)
        known = no_evidence if store is None else stored_evidence(store, needs).read
        applied = AppliedChoices(job.decoder, {choice.name: choice for choice in self.choices}, known)
        progress.phase("timing kernels" if self.asked.goal != "bytes" else "counting bytes")
        found = prices(job.decoder, self.units, self.choices, applied, self.asked.goal, self._told_apart)
        whole = whole_of(job, self.asked.goal, self.units, found, AS_IT_IS)
        text = job.texts[0]
        tokens = self._tokens()
        single = Trials(job.decoder, applied, _Memory(folder, "single"), tokens[: self.asked.samples], job.batch)
        windows = text.ids.reshape(-1, text.window)
        whole_text = Trials(job.decoder, applied, _Memory(folder, "together"), windows, job.batch)
        with single, whole_text:
            findings = self._search(found, whole, single, whole_text)
            picks, recipe, outcome = self._answer(findings)
        return report_of(job, self.asked.goal, self.asked.limits, findings, picks, recipe, outcome, begun)

    def _tokens(self) -> Tensor:
        """Calibration tokens `[samples, length]`, also where no stage of the menu reads any."""
        job, calibration = self.job, self.job.recipe.calibration
        if job.tokens is not None:
            return job.tokens
        assert calibration is not None, "a search begins with a calibration section"
        tokenizer = None if job.folder is None else load_tokenizer(job.folder)
        return calibration_tokens(calibration, tokenizer, job.decoder.config)

    def _told_apart(self, done: int, total: int) -> None:
        self.progress.block(done, total, 0.0)

    def _search(self, found: Prices, whole: Whole, single: Trials, text: Trials) -> Findings:
        """Losses of units, then the front."""
        units, asked = self.units, self.asked
        options = worthwhile(units, self.choices, found)
        measurer = Measurer(single, units, options, self.progress.block)
        self.progress.phase("measuring what choices lose")
        how = measurer.how(asked.measure, asked.minutes)
        losses = measurer.each() if how == "each" else measurer.separable()
        names = tuple(tuple(choice.name for choice in options[unit.name]) for unit in units)
        table = Table(
            names,
            tuple(tuple(found[unit.name, name].cost for name in own) for unit, own in zip(units, names, strict=True)),
            tuple(tuple(losses[unit.name, name] for name in own) for unit, own in zip(units, names, strict=True)),
            {},
        )
        dense = together(text, units, {})
        self.progress.phase("measuring choices of everything")
        excess = partial(self._excess, dense.perplexity)
        points = front(table, partial(self._together, text, names), excess)
        pairs = list[Pair]()
        chosen = best(points)
        if asked.pairs and chosen is not None:
            self.progress.phase("measuring pairs")
            cosines, tables = measured_pairs(single, units, table, chosen.picks, asked.pairs)
            table = Table(table.names, table.costs, table.losses, tables)
            points = front(table, partial(self._together, text, names), excess)
            pairs = [Pair(units[one].name, units[other].name, cosine) for (one, other), cosine in cosines.items()]
        tokens = asked.samples * (0 if self.job.tokens is None else self.job.tokens.shape[1] - 1)
        return Findings(units, self.choices, found, whole, losses, how, table, points, pairs, dense.perplexity, tokens)

    def _together(self, text: Trials, names: Sequence[Sequence[str]], picks: Sequence[int]) -> Trial:
        chosen = {unit.name: own[pick] for unit, own, pick in zip(self.units, names, picks, strict=True)}
        return together(text, self.units, chosen)

    def _excess(self, dense: float, trial: Trial) -> float:
        return self.asked.limits.excess(trial.perplexity / dense - 1, trial.kl)

    def _recipe(self, findings: Findings, picks: Sequence[int]) -> dict[str, Any]:
        by_name = {choice.name: choice for choice in self.choices}
        chosen = {
            unit.name: by_name[findings.table.names[place][pick]]
            for place, (unit, pick) in enumerate(zip(self.units, picks, strict=True))
        }
        return recipe_of(self.base, self.job.decoder, self.units, chosen, findings.prices, self.asked.goal)

    def _answer(self, findings: Findings) -> tuple[Sequence[int], dict[str, Any], Outcome]:
        """The places of the answer, its recipe, and what its run gave: gain, quality, verdict."""
        limits, points = self.asked.limits, [point for point in findings.points if any(point.picks)]
        nothing = [0] * len(self.units)
        if not points:
            return nothing, dict(self.base), (None, None, "no choice is cheaper than the model as it is")
        chosen = best(points)
        if chosen is None:
            chosen = min(points, key=lambda point: point.excess)
            verdict = (
                f"no combination keeps {limits.words}: the closest comes to {self._lost(chosen.measured, findings)} "
                f"and is {findings.whole.gain(chosen.cost):.2f}x by the table"
            )
            return chosen.picks, self._recipe(findings, chosen.picks), (None, None, verdict)
        runs = self._runs(findings, chosen)
        kept = [run for run in runs if run.used <= 1]
        cheapest = min(kept, key=lambda run: findings.table.cost(run.picks), default=None)
        final = cheapest or min(runs, key=lambda run: run.used)
        place = self.folder.path / MODEL
        if place.exists():
            shutil.rmtree(place)
        final.path.rename(place)
        for run in runs:
            if run is not final:
                shutil.rmtree(run.path)
        return final.picks, final.recipe, (final.gain, final.quality, self._verdict(final, findings))

    def _runs(self, findings: Findings, chosen: Point) -> list["_Run"]:
        """The recipe of a point, run; and of another one where it missed the limit, or left much of it."""
        found, picks = list[_Run](), chosen.picks
        for number in range(1, self.asked.runs + 1):
            run = self._run(findings, picks, number)
            found.append(run)
            if LOOSE <= run.used <= 1:
                break
            missed = sum(each.used > 1 for each in found)
            aim = min(MARGIN ** max(missed, 1) / run.used, STRETCH) if run.used > 0 else STRETCH
            other = findings.table.solve(findings.table.loss(picks) * aim)
            if other is None or not any(other) or tuple(other) in [each.picks for each in found]:
                break
            picks = tuple(other)
        return found

    def _run(self, findings: Findings, picks: tuple[int, ...], number: int) -> "_Run":
        recipe, path = self._recipe(findings, picks), self.folder.path / f"run-{number}"
        begun = path.exists() or path.with_name(f"{path.name}.partial").exists()
        result = execute(
            Recipe.read(recipe), self.progress, output=path, device=self.job.device, force=True, resume=begun
        )
        candidate = result.report.candidates[0]
        quality = candidate.quality[0]
        used = self.asked.limits.excess(quality.change, quality.kl)
        return _Run(picks, recipe, path, quality, used, self._gain(candidate, findings.whole))

    def _gain(self, candidate: Candidate, whole: Whole) -> float:
        """Of the answer over the dense model: on the same kernels, where these were timed."""
        if self.asked.goal == "bytes":
            return whole.cost / candidate.bytes_sparse
        speed = candidate.speed
        assert speed is not None, "a search for speed measures it"
        ratios = speed.engine_dense or speed
        return (ratios.decode_ratio if self.asked.goal == "tokens/s" else ratios.first_token_ratio).median

    def _verdict(self, run: "_Run", findings: Findings) -> str | None:
        limits, said = self.asked.limits, []
        if run.used > 1:
            reached = f"perplexity {numbers.change(run.quality.change)}, KL {numbers.divergence(run.quality.kl)}"
            said.append(f"{limits.words} was asked for: the closest run comes to {reached}")
        if limits.least is not None and run.gain < limits.least:
            enough = [point for point in findings.points if findings.whole.gain(point.cost) >= limits.least]
            cheapest = min(enough, key=lambda point: point.excess, default=None)
            price = (
                "no combination is predicted to"
                if cheapest is None
                else f"it would take {self._lost(cheapest.measured, findings)}"
            )
            said.append(f"{limits.least:g}x was asked for: the answer is {run.gain:.2f}x; {price}")
        return "; ".join(said) or None

    def _lost(self, trial: Trial, findings: Findings) -> str:
        change = trial.perplexity / findings.dense_perplexity - 1
        return f"perplexity {numbers.change(change)}, KL {numbers.divergence(trial.kl)}"


@dataclass(frozen=True)
class _Run:
    """A measured run: how much of the limits it uses, and what it gains."""

    picks: tuple[int, ...]
    recipe: dict[str, Any]
    path: Path
    quality: Quality
    used: float
    gain: float
