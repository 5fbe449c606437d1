"""Several models beside a first one: the data of `compare.json`. `docs/compare.md` describes it."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sparity.measure.data.bench_report import BenchReport
from sparity.measure.data.plain import plain
from sparity.measure.data.report import Contestant, Quality, Spread
from sparity.measure.data.task_comparison import TaskComparison
from sparity.measure.data.task_report import TaskResult

FORMAT = 1


@dataclass(frozen=True)
class Compared:
    """One model.

    Attributes:
        name: as it was given.
        parameters: of its checkpoint.
        file_bytes: of its weight files, with data of run-time stages.
        zeros: the share of its parameters that are zero.
        runtime: its run-time stages, by name.
        quality: on each text, beside the first model; the first one's own is what it is to itself.
        tasks: what it got.
        differences: from the first model, item by item; none for the first.
    """

    name: str
    parameters: int
    file_bytes: int
    zeros: float
    runtime: tuple[str, ...]
    quality: tuple[Quality, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    differences: tuple[TaskComparison, ...] = ()


@dataclass(frozen=True)
class ComparisonReport:
    """Models measured in one run on one machine; the first is what the others are compared with."""

    models: tuple[Compared, ...]
    speed: BenchReport | None
    notes: tuple[str, ...] = ()
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> Compared:
        """What the others are compared with."""
        return self.models[0]

    def decode(self, name: str) -> Spread | None:
        """Tokens per second of a model at the first batch size."""
        found = None if self.speed is None else [t for t in self.speed.timings if t.name == name]
        return found[0].pace.decode if found else None

    def faster(self, name: str) -> Spread | None:
        """How many times as fast as the first model a model decodes, round by round; None for the first itself."""
        ratios = [] if self.speed is None else [ratio for ratio in self.speed.ratios if ratio.against == name]
        return inverted(ratios[0].decode) if ratios else None

    def memory(self, name: str) -> tuple[int, int | None] | None:
        """Bytes of a model's weights in memory, and the peak of a process that generates with it."""
        if self.speed is None:
            return None
        weights = next(runner.weight_bytes for runner in self.speed.runners if runner.name == name)
        return weights, next(timing.peak_memory for timing in self.speed.timings if timing.name == name)

    def contestants(self) -> tuple[Contestant, ...]:
        """The models as marks of quality against speed, by the first text."""
        found = []
        for model in self.models:
            rate, memory = self.decode(model.name), self.memory(model.name)
            if rate and memory and model.quality:
                kind = "dense" if model is self.first else "sparse"
                found.append(Contestant(model.name, rate, model.quality[0].perplexity, kind, memory[0]))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The content of `compare.json`; what tasks got for each item is left out."""
        models = [replace(model, tasks=()) for model in self.models]
        content: dict[str, Any] = plain(
            {
                "format": FORMAT,
                "models": [asdict(model) for model in models],
                "speed": None if self.speed is None else self.speed.to_dict(),
                "notes": self.notes,
                "machine": self.machine,
            }
        )
        for written, model in zip(content["models"], self.models, strict=True):
            written["tasks"] = [
                {"name": task.name, "source": task.source, "fewshot": task.fewshot, "way": task.way, "cut": task.cut}
                | {"scores": {score.metric: plain(score.value) for score in task.scores}}
                for task in model.tasks
            ]
        return content


def inverted(ratio: Spread) -> Spread:
    """How much faster the opponent is than the subject, from how much faster the subject is."""
    return Spread(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)
