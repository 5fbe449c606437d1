"""What a run would do, before it does anything: shapes, bytes, predicted memory, disk and time after each stage."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from sparity.calibration.gradients import gradient_bytes
from sparity.calibration.input_statistics.base import statistic
from sparity.calibration.store import store_bytes
from sparity.measure.tasks.planning import Needed, needed_items
from sparity.models import Decoder
from sparity.pipeline.evidence.dense_statistics import stored_needs
from sparity.pipeline.run.job import Job
from sparity.pipeline.run.planned import PlannedPass, PlannedStage
from sparity.stages import Change
from sparity.stages.base import Estimate, Workload
from sparity.stages.order import needs_of

FP32, FP64 = 4, 8
LOGIT_COPIES = 4  # float32 copies of one sequence's logits alive at once: themselves, log-probabilities, gradients


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
    """

    model: str
    stages: tuple[StageForecast, ...]
    samples: int
    length: int
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    tasks: tuple[Needed, ...] = ()

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


def plan(job: Job) -> Plan:
    """Predict a prepared job; nothing is written and no weight is read."""
    work, loss = job.opened.workload, job.recipe.measure.layer_loss
    rate = flops_per_second(job.decoder.dtype, job.device)
    stages: list[StageForecast] = []
    memory: dict[str, int] = {}
    disk: dict[str, int] = {}
    runtime = 0
    for planned in job.passes:
        estimates = [each.stage.estimate(each.model, each.draft, work) for each in planned.stages]
        taken = _memory(planned, estimates, job, loss)
        memory = max(memory, taken, key=lambda parts: sum(parts.values()))
        there = _disk(planned, estimates, job, stages)
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
                    seconds=(estimate.flops + _forward(each, work, loss)) / rate,
                    parameters=parameters,
                    bytes=parameters * job.decoder.dtype.itemsize + runtime,
                )
            )
    return Plan(job.name, tuple(stages), work.samples, work.length, memory, disk, tuple(_tasks(job)))


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


def _memory(planned: PlannedPass, estimates: list[Estimate], job: Job, loss: bool) -> dict[str, int]:
    """What a pass has in memory at once."""
    model, work, width = planned.stages[0].model, job.opened.workload, job.decoder.dtype.itemsize
    needs = [needs_of(each.stage, loss) for each in planned.stages]
    blocks = _blocks(model)
    weights, grams = max(weights for weights, _ in blocks), max(grams for _, grams in blocks)
    memory = {
        "embeddings, norms and head": (_parameters(model) - sum(inside for inside, _ in blocks)) * width,
        "one block": weights * width,
        "hidden states": 2 * work.tokens * int(model.config.hidden_size) * width,
        "Gram matrices": grams * FP32 if any("gram" in need.statistics for need in needs) else 0,
    }
    largest: Counter[str] = Counter()
    for estimate in estimates:  # one stage works after the other
        largest |= Counter({name: size for name, size in estimate.memory.items() if size})
    gradients = max(len(need.gradients) for need in needs)
    if gradients:  # a block's gradients with their sums, or the logits of one sequence with their own gradients
        sums = weights * (width + FP32 * gradients)
        memory["gradients"] = max(sums, LOGIT_COPIES * FP32 * work.length * int(model.config.vocab_size))
    if memory["Gram matrices"]:  # over chunks, in float64 and by halves, before any stage works
        sums = max(_sums_over_chunks(model, index) for index in range(len(model)))
        memory["sums over chunks"] = max(sums - sum(largest.values()), 0)
    return memory | dict(largest)


def _sums_over_chunks(model: Decoder, index: int) -> int:
    gram = statistic("gram")
    return sum(FP64 // FP32 * gram.nbytes(site.projections[0].weight.shape[1]) for site in model.sites(index))


def _disk(planned: PlannedPass, estimates: list[Estimate], job: Job, before: list[StageForecast]) -> dict[str, int]:
    """What lies in the run's folder at once while a pass works, beside its result."""
    first, work = planned.stages[0], job.opened.workload
    needs = needs_of(first.stage, job.recipe.measure.layer_loss)
    stored = stored_needs(needs, job.store is not None and planned.number == 1)
    found: Counter[str] = Counter(
        {
            "the pass before": before[-1].bytes if before else 0,
            "gradients": gradient_bytes(first.model, work.samples, work.length, needs.gradients),
            "statistics": store_bytes(first.model, stored),
        }
    )
    for estimate in estimates:
        found += Counter(dict(estimate.disk))
    return {name: size for name, size in found.items() if size}


def _forward(each: PlannedStage, work: Workload, loss: bool) -> float:
    """Operations of the forward passes for one stage, and of the sums over what they give."""
    needs = needs_of(each.stage, loss)
    blocks = _blocks(each.model)
    passes = 0 if not needs.statistics else 1 if needs.order == "independent" else 2
    passes += 1 if needs.decision else 0
    if needs.gradients:
        passes += 4  # forward twice, and backward to the inputs and to the weights
    operations = 2.0 * passes * sum(weights for weights, _ in blocks) * work.tokens
    if "gram" in needs.statistics:
        operations += 2.0 * sum(grams for _, grams in blocks) * work.tokens
    return operations


def flops_per_second(dtype: torch.dtype, device: str, size: int = 768) -> float:
    """The rate of a square matrix product of this machine, the best of five."""
    left = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        float((left @ left)[0, 0])
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best
