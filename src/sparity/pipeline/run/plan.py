"""What a run would do, before it does anything: sites, bytes, predicted memory and time."""

import time
from dataclasses import dataclass

import torch

from sparity.calibration.gradients import gradient_bytes
from sparity.calibration.store import store_bytes
from sparity.pipeline.run.job import Job
from sparity.static.prune.pruning import Pruning

FP32 = 4
WORKSPACE = 6  # float32 copies of the largest matrix alive at once: weight, scores, order (int64), mask, result
SOLVER_WORKSPACE = 4  # float32 copies of the largest Gram matrix: Hessian, damped, factor, its inverse

LOGIT_COPIES = 4  # float32 copies of one sequence's logits alive at once: themselves, log-probabilities, gradients


@dataclass(frozen=True)
class PlannedSite:
    """One projection of the plan."""

    name: str
    role: str
    shape: tuple[int, int]
    parameters: int
    bytes: int
    target: float


@dataclass(frozen=True)
class Plan:
    """Predictions are estimates: memory of the pruning from sizes, time from a short measurement of this machine."""

    method: str
    model: str
    sites: tuple[PlannedSite, ...]
    statistics: tuple[str, ...]
    samples: int
    length: int
    memory: dict[str, int]  # bytes, by what takes them
    seconds: float
    output_bytes: int  # of the plain checkpoint; packing makes it smaller
    gradient_bytes: int  # the most that gradients and what they are made from have on disk, in the run's folder
    store_bytes: int  # of the dense model's statistics that are kept on disk

    @property
    def peak_memory(self) -> int:
        """Predicted resident bytes while pruning, beside the interpreter and its libraries."""
        return sum(self.memory.values())


def plan(job: Job) -> Plan:
    """Predict a prepared job; nothing is written and no weight is read."""
    decoder = job.decoder
    width = decoder.dtype.itemsize
    sites, grams, forward = [], 0.0, 0.0
    largest = largest_input = gram_bytes = block_bytes = 0
    for index in range(len(decoder)):
        inside = gram_inside = 0
        for site in decoder.sites(index):
            columns = site.projections[0].weight.shape[1]
            largest_input = max(largest_input, columns)
            gram_inside += columns**2 * FP32
            grams += columns**2
            for projection in site.projections:
                rows, columns = projection.weight.shape
                inside += rows * columns
                largest = max(largest, rows * columns)
                target = job.targets[projection.name]
                sites.append(
                    PlannedSite(projection.name, projection.role, (rows, columns), rows * columns,
                                rows * columns * width, target)
                )  # fmt: skip
        forward += inside
        block_bytes = max(block_bytes, inside * width)
        gram_bytes = max(gram_bytes, gram_inside)
    samples, length = (0, 0) if job.tokens is None else tuple(job.tokens.shape)
    needs_gram = "gram" in job.needs
    inside_names = sum(site.parameters for site in sites)
    total = sum(torch.Size(shape).numel() for shape in decoder.source.shapes().values())
    memory = {
        "embeddings, norms and head": (total - inside_names) * width,
        "one block": block_bytes,
        "hidden states": 2 * samples * length * int(decoder.config.hidden_size) * width,
        "Gram matrices": gram_bytes if needs_gram else 0,
        "solver": largest_input**2 * FP32 * SOLVER_WORKSPACE if needs_gram else 0,
        "scores and mask": largest * FP32 * WORKSPACE,
        "gradients": _gradient_memory(job, block_bytes // width, length),
    }
    flops = _flops(job.pruning, forward, grams, samples * length, job)
    return Plan(
        method=job.pruning.words,
        model=job.name,
        sites=tuple(sites),
        statistics=tuple(sorted(job.needs | job.gradients)),
        samples=samples,
        length=length,
        memory=memory,
        seconds=flops / _flops_per_second(decoder.dtype, job.device),
        output_bytes=total * width,
        gradient_bytes=gradient_bytes(decoder, samples, length, job.gradients),
        store_bytes=store_bytes(decoder, job.stored_needs),
    )


def _gradient_memory(job: Job, block: int, length: int) -> int:
    """A block's gradients with their sums, or the logits of one sequence with their own gradients."""
    if not job.gradients:
        return 0
    sums = block * (job.decoder.dtype.itemsize + FP32 * len(job.gradients))
    return max(sums, LOGIT_COPIES * FP32 * length * int(job.decoder.config.vocab_size))


def _flops(pruning: Pruning, forward: float, grams: float, tokens: int, job: Job) -> float:
    passes = 0 if not job.needs else (1 if job.prune.order == "independent" else 2)
    if job.gradients:
        passes += 4  # forward twice, and backward to the inputs and to the weights
    operations = 2.0 * passes * forward * tokens
    if "gram" in job.needs:
        operations += 2.0 * grams * tokens
        operations += sum(2.0 * rows * columns**2 for rows, columns in _shapes(job))  # solver updates
    return operations + 50.0 * forward  # scoring, ranking and reading each weight


def _shapes(job: Job) -> list[tuple[int, int]]:
    return [
        (projection.weight.shape[0], projection.weight.shape[1])
        for index in range(len(job.decoder))
        for site in job.decoder.sites(index)
        for projection in site.projections
    ]


def _flops_per_second(dtype: torch.dtype, device: str, size: int = 768) -> float:
    """The rate of a square matrix product of this machine, the best of five."""
    left = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        float((left @ left)[0, 0])
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best
