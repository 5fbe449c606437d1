"""What a run would do, before it does anything: shapes, bytes, predicted memory, disk and time after each stage."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from sparity.calibration.gradients import gradient_bytes
from sparity.calibration.store import store_bytes
from sparity.measure.tasks.planning import Needed, needed_items
from sparity.models import Decoder
from sparity.pipeline.evidence.dense_statistics import stored_needs
from sparity.pipeline.run.job import Job
from sparity.pipeline.run.planned import PlannedPass, PlannedStage
from sparity.pipeline.run.planned_memory import PlannedMemory, plan_memory
from sparity.products.choice import emulated
from sparity.stages import Change
from sparity.stages.base import Estimate, Workload
from sparity.stages.order import needs_of


@dataclass(frozen=True)
class StageForecast:
    """One stage of the plan.

    Attributes:
        name: the stage's, in recipes.
        words: what it does.
        number: of its pass, from 1.
        statistics: what it reads.
        changes: per projection, with targets in place of what will be realised.
        seconds: predicted, with the forward passes that it needs.
        parameters: of the model after it.
        bytes: of that model's plain checkpoint, with data of run-time stages.
    """

    name: str
    words: str
    number: int
    statistics: tuple[str, ...]
    changes: tuple[Change, ...] = field(repr=False)
    seconds: float
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Predictions are estimates: memory and disk from sizes, time from a short measurement of this machine.

    Attributes:
        model: its name.
        stages: in the recipe's order.
        samples: calibration sequences.
        length: tokens of each.
        memory: the most bytes at once beside the interpreter and its libraries, by what takes them.
        disk: the most bytes at once in the run's folder beside the result, by what takes them.
        tasks: what each limit on a task asks of its sample.
        gram_passes: forward passes through a block for its Gram matrices, where a limit keeps them in files; else 0.
    """

    model: str
    stages: tuple[StageForecast, ...]
    samples: int
    length: int
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    tasks: tuple[Needed, ...] = ()
    gram_passes: int = 0

    @property
    def peak_memory(self) -> int:
        """Predicted resident bytes, beside the interpreter and its libraries; measuring not counted."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Of all stages; measuring not counted."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def output_bytes(self) -> int:
        """Of the plain checkpoint; packing makes it smaller."""
        return self.stages[-1].bytes


def plan(job: Job, limit: int | str | None = None) -> Plan:
    """Predict a prepared job, with its memory within a `limit` if need be; nothing is written and no weight is read.

    Raises:
        InvalidInput: the limit cannot be kept.
    """
    taken = plan_memory(job, limit)
    work, loss = job.opened.workload, job.recipe.measure.layer_loss
    rate = flops_per_second(job.decoder.dtype, job.device)
    stages: list[StageForecast] = []
    disk: dict[str, int] = {}
    runtime = 0
    for planned in job.passes:
        estimates = [each.stage.estimate(each.model, each.draft, work) for each in planned.stages]
        there = _disk(planned, estimates, job, stages, taken)
        disk = max(disk, there, key=lambda parts: sum(parts.values()))
        for each, estimate in zip(planned.stages, estimates, strict=True):
            after = _after(each)
            parameters = _parameters(after)
            runtime += estimate.runtime_bytes
            needs = needs_of(each.stage, loss)
            stages.append(
                StageForecast(
                    name=each.stage.name,
                    words=each.stage.words,
                    number=planned.number,
                    statistics=tuple(sorted(needs.statistics | needs.gradients | needs.decision)),
                    changes=estimate.changes,
                    seconds=(estimate.flops + _forward(each, work, loss, taken.passes)) / rate,
                    parameters=parameters,
                    bytes=parameters * job.decoder.dtype.itemsize + runtime,
                )
            )
    tasks = tuple(_tasks(job))
    return Plan(job.name, tuple(stages), work.samples, work.length, taken.parts, disk, tasks, taken.passes)


def _tasks(job: Job) -> Iterator[Needed]:
    asked = job.recipe.measure.tasks
    for name, limit in job.recipe.accept.tasks.items():
        assert asked is not None, "the recipe was checked"
        yield needed_items(name, limit, asked.settings)


def _after(each: PlannedStage) -> Decoder:
    return each.stage.after(each.model, each.draft)


def _parameters(model: Decoder) -> int:
    return sum(math.prod(shape) for shape in model.source.shapes().values())


def _blocks(model: Decoder) -> list[tuple[int, int]]:
    """Of each block the number of its projections' weights, and that of the entries of its Gram matrices."""
    found = []
    for index in range(len(model)):
        sites = model.sites(index)
        weights = sum(projection.weight.numel() for site in sites for projection in site.projections)
        found.append((weights, sum(site.projections[0].weight.shape[1] ** 2 for site in sites)))
    return found


def _disk(
    planned: PlannedPass, estimates: list[Estimate], job: Job, before: list[StageForecast], memory: PlannedMemory
) -> dict[str, int]:
    """What lies in the run's folder at once while a pass works, beside its result."""
    first, work = planned.stages[0], job.opened.workload
    needs = needs_of(first.stage, job.recipe.measure.layer_loss)
    stored = stored_needs(needs, job.store is not None and planned.number == 1)
    found: Counter[str] = Counter(
        {
            "the pass before": before[-1].bytes if before else 0,
            "gradients": gradient_bytes(first.model, work.samples, work.length, needs.gradients),
            "statistics": store_bytes(first.model, stored),
            "Gram matrices": memory.disk,
        }
    )
    for estimate in estimates:
        found += Counter(dict(estimate.disk))
    return {name: size for name, size in found.items() if size}


def _forward(each: PlannedStage, work: Workload, loss: bool, slices: int) -> float:
    """Operations of the forward passes for one stage, and of the sums over what they give."""
    needs = needs_of(each.stage, loss)
    blocks = _blocks(each.model)
    passes = 0 if not needs.statistics else 1 if needs.order == "independent" else 2
    passes += 1 if needs.decision else 0
    if needs.gradients:
        passes += 4  # forward twice, and backward to the inputs and to the weights
    operations = 2.0 * passes * sum(weights for weights, _ in blocks) * work.tokens
    if "gram" in needs.statistics:
        operations *= (passes + max(slices, 1) - 1) / passes
        operations += 2.0 * sum(grams for _, grams in blocks) * work.tokens
    return operations


def flops_per_second(dtype: torch.dtype, device: str, size: int = 768) -> float:
    """The rate of a square matrix product of this machine, the best of five.

    On the processor it is that of float32 where products in `dtype` are computed so, many times faster.
    """
    computed = torch.float32 if device == "cpu" and emulated(dtype) else dtype
    left = torch.ones(size, size, dtype=computed, device=device)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        float((left @ left)[0, 0])
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best
