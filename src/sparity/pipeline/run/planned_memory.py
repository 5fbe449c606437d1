"""What a run has in memory at once, predicted from shapes, and how it is kept within a limit.

A run does one thing after the other: it copies what lies outside the blocks, loads a block, gathers statistics of its
inputs, and lets each stage work on it. The prediction is what the largest of these takes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from sparity.calibration.gradients import statistics_bytes
from sparity.calibration.gram_slices import panel_bytes, slices
from sparity.calibration.input_statistics.base import statistic
from sparity.errors import InvalidInput
from sparity.memory import as_bytes
from sparity.models import Decoder
from sparity.pipeline.evidence.dense_statistics import stored_needs
from sparity.pipeline.run.job import Job
from sparity.pipeline.run.planned import PlannedPass
from sparity.stages.order import needs_of

FP32, FP64 = 4, 8
LOGIT_COPIES = 4  # float32 copies of one sequence's logits alive at once: themselves, log-probabilities, gradients
ACTIVATIONS = 3  # of the widest input alive at once in a block's own type: gate, up and their product
SMALL = 24 << 20  # bytes: code that is loaded on the way, workspaces of products
SPARE = 0.1  # of the room for sums that a limit leaves, kept free since all this is a prediction
Parts = dict[str, int]  # what takes memory -> bytes


@dataclass(frozen=True)
class PlannedMemory:
    """Memory of a run.

    Attributes:
        parts: the most bytes at once beside the interpreter and its libraries, by what takes them.
        sums: bytes of sums that Gram matrices in files may take at once; None where all of them are in memory.
        passes: forward passes through a block for its Gram matrices, the most of any block; 0 without such files.
        disk: bytes of those files, the most at once.
    """

    parts: Mapping[str, int]
    sums: int | None = None
    passes: int = 0
    disk: int = 0

    @property
    def peak(self) -> int:
        """Bytes altogether."""
        return sum(self.parts.values())


def plan_memory(job: Job, limit: int | str | None = None) -> PlannedMemory:
    """Predict a prepared job; within a `limit`, in bytes or such as "5GB", Gram matrices are in files if need be.

    Raises:
        InvalidInput: the limit cannot be kept, or is not of this machine's memory.
    """
    found = PlannedMemory(_largest(_phases(job, None)))
    if limit is None:
        return found
    most = as_bytes(limit)
    if job.device != "cpu":
        raise InvalidInput(
            f"memory: the limit is of the processor's memory, and the device is {job.device}: leave one out"
        )
    if found.peak <= most:
        return found
    matrices = [widths for planned in job.passes for widths in gram_widths(planned, job)]
    least = max((panel_bytes(max(widths)) for widths in matrices), default=0)
    smallest = _largest(_phases(job, least))
    if sum(smallest.values()) > most or not matrices:
        parts = "; ".join(f"{name} {size / 1e9:.2f} GB" for name, size in smallest.items() if size)
        raise InvalidInput(
            f"memory: {most / 1e9:.2f} GB are not enough: this run takes at least "
            f"{sum(smallest.values()) / 1e9:.2f} GB beside the libraries ({parts})"
        )
    others = _largest(part for part in _phases(job, 0) if "sums of Gram matrices" in part)
    sums = max(least, int((1 - SPARE) * (most - sum(others.values()))))
    return PlannedMemory(
        _largest(_phases(job, sums)),
        sums,
        max(len(slices(widths, sums)) for widths in matrices),
        max(FP32 * (sum(width**2 for width in widths) + max(widths) ** 2) for widths in matrices),
    )


def _largest(phases: Iterator[Parts]) -> Parts:
    largest = max(phases, key=lambda parts: sum(parts.values()))
    return {name: size for name, size in largest.items() if size}


def _phases(job: Job, sums: int | None) -> Iterator[Parts]:
    """What is in memory at once, for everything that a run does; with Gram matrices in files so many bytes of sums."""
    for planned in job.passes:
        model, loss = planned.stages[0].model, job.recipe.measure.layer_loss
        filed = sums is not None and bool(gram_widths(planned, job))
        work, width = replace(job.opened.workload, in_files=filed), job.decoder.dtype.itemsize
        outside = max((math.prod(shape) for shape in model.rest_shapes().values()), default=0)
        yield {"embedding or head": outside * width, "small things": SMALL}
        needs = [needs_of(each.stage, loss) for each in planned.stages]
        weights, inputs = _weights(model), _widths(model)
        hidden = 2 * work.tokens * int(model.config.hidden_size) * width if any(n.calibration for n in needs) else 0
        block = {  # pages of the file that a block was read from stay, as long as it does
            "one block": weights * width,
            "its pages of the file": weights * width,
            "hidden states": hidden,
            "small things": SMALL,
        }
        yield block
        live = [n for n in needs if n.statistics or n.sequences]
        if live:
            tokens = min(work.batch, work.samples) * work.length
            wide = max(max(widths) for widths in inputs)
            block["activations of a batch"] = tokens * wide * (ACTIVATIONS * width + 2 * FP32)
        grams = any("gram" in n.statistics for n in live)
        if grams and filed:
            yield {**block, "sums of Gram matrices": min(sums or 0, max(map(_all_panels, inputs)))}
        elif grams:
            panels = max(sum(statistic("gram").nbytes(w) for w in widths) for widths in inputs)
            yield {**block, "Gram matrices of a chunk": panels, "sums over chunks": FP64 // FP32 * panels}
        sites = [model.sites(index) for index in range(len(model))]
        gradients = max(statistics_bytes(each, n.gradients) for n in needs for each in sites)
        if gradients:  # a block's gradients with their sums, or the logits of one sequence with their own gradients
            of_block = weights * width + gradients
            yield {
                **block,
                "gradients": max(of_block, LOGIT_COPIES * FP32 * work.length * int(model.config.vocab_size)),
            }
        block.pop("activations of a batch", None)
        for each in planned.stages:
            own = {
                name: size for name, size in each.stage.estimate(each.model, each.draft, work).memory.items() if size
            }
            kept = 0 if filed or not grams else max(_while_solving(widths) for widths in inputs)
            yield {**block, "Gram matrices": kept, "gradients": gradients, **own}


def gram_widths(planned: PlannedPass, job: Job) -> list[list[int]]:
    """Of each block the widths of the Gram matrices that can lie in files; none where some stage reads them whole."""
    found = list[list[int]]()
    for each in planned.stages:
        needs = needs_of(each.stage, job.recipe.measure.layer_loss)
        stored = stored_needs(needs, job.store is not None and planned.number == 1)
        if "gram" in needs.statistics:
            if "gram" in stored or job.recipe.measure.layer_loss or not each.stage.gram_by_rows:
                return []
            found = _widths(each.model)
    return found


def _weights(model: Decoder) -> int:
    """Of the largest block."""
    return max(
        sum(projection.weight.numel() for site in model.sites(index) for projection in site.projections)
        for index in range(len(model))
    )


def _widths(model: Decoder) -> list[list[int]]:
    """Of each block the widths of its inputs, in order."""
    return [[int(site.projections[0].weight.shape[1]) for site in model.sites(index)] for index in range(len(model))]


def _all_panels(widths: list[int]) -> int:
    """What the sums of all panels take: those of a chunk, and those over chunks in float64."""
    return sum((FP32 + FP64) // FP32 * statistic("gram").nbytes(width) for width in widths)


def _while_solving(widths: list[int]) -> int:
    """The upper panels that are there while the widest input's projections are worked on: its own, and later ones."""
    widest = widths.index(max(widths))
    return sum(statistic("gram").nbytes(width) for width in widths[widest:])
