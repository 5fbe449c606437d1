"""The prune stage: every block in turn, committed before the next begins."""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparity import registry
from sparity.calibration import Statistics, Step, walk
from sparity.calibration.gradients import gather_gradients, gradient_file, read_gradients
from sparity.calibration.regional import regional_gradients
from sparity.calibration.statistics import REGIONAL
from sparity.calibration.store import StatisticsStore
from sparity.checkpoints.source import read_header
from sparity.errors import CorruptFile, NumericalError
from sparity.measure.data.report import Layer
from sparity.models import BlockInputs
from sparity.pipeline.evidence.hidden_states import block_inputs
from sparity.pipeline.run.export import shard_name
from sparity.pipeline.run.job import Job
from sparity.pipeline.run.progress import Progress
from sparity.pipeline.run.run_folder import START_OVER, RunFolder

log = logging.getLogger(__name__)

NO_INPUTS = (BlockInputs(torch.empty(0), {}, 1), None, None)  # of a walk without a forward pass


def prune_blocks(job: Job, folder: RunFolder, progress: Progress, store: StatisticsStore | None = None) -> None:
    """Prune what is not committed yet. Shard 1 holds everything outside the blocks, shard 2 the first block.

    A job in the independent order reads its statistics from `store`, where there is one, and passes nothing forward.
    """
    decoder, total = job.decoder, len(job.decoder)
    committed = folder.progress
    if committed.blocks:
        _check_finished(folder.path, committed.blocks, total)
    if committed.blocks == total:
        return
    if committed.blocks == 0:
        folder.save_shard(shard_name(1, total + 1), decoder.rest())
    torch.set_num_threads(folder.threads)
    kept = store if store is not None and job.gradients <= store.needs else None
    if not job.prunes_from_store:
        store = None
    if job.gradients and job.tokens is not None and kept is None:
        progress.phase("gradients")
        gather_gradients(decoder, job.tokens, job.gradients, folder.state)
        progress.phase("pruning")
    inputs, hidden, room = block_inputs(job, folder, bool(job.regional)) if job.needs and store is None else NO_INPUTS
    steps = walk(
        decoder,
        inputs,
        job.needs,
        order=job.prune.order,
        true_sequential=job.prune.true_sequential,
        start=committed.blocks,
        hidden=hidden,
        room=room,
        known=None if store is None else store.read,
    )
    started = time.perf_counter()
    for step in steps:
        gradients = _gradients(job, folder, kept, step)
        layers = _prune_block(job, step, gradients)
        if job.needs:
            step.finish()
        index = step.block.index
        folder.save_shard(shard_name(index + 2, total + 1), decoder.export(step.block))
        seconds = time.perf_counter() - started
        record = {"seconds": seconds, "layers": [asdict(layer) for layer in layers]}
        passed_on = job.needs and store is None and index + 1 < total
        folder.commit(index + 1, step.hidden if passed_on else None, record)
        progress.block(index + 1, total, seconds)
        started = time.perf_counter()


def _check_finished(folder: Path, blocks: int, total: int) -> None:
    """Raise `CorruptFile` when a shard that was committed is missing or truncated."""
    if blocks > total:
        raise CorruptFile(f"{folder} records {blocks} finished blocks of {total}: {START_OVER}")
    for number in range(1, blocks + 2):
        try:
            read_header(folder / shard_name(number, total + 1))
        except CorruptFile as error:
            raise CorruptFile(f"a finished shard of the run is lost ({error}): {START_OVER}") from error


def _gradients(
    job: Job, folder: RunFolder, store: StatisticsStore | None, step: Step
) -> Mapping[str, Mapping[str, Tensor]]:
    """Projection -> gradient statistic -> `[out, in]`: of the loss, from disk, and of the block as it is reached."""
    found: dict[str, dict[str, Tensor]] = {}
    if store is not None:  # gradients of the loss are the dense model's; a block's own are too where its inputs are
        wanted = job.gradients | (job.regional if job.prunes_from_store else frozenset())
        found = store.gradients(step.block, wanted)
    elif job.gradients:
        found = read_gradients(gradient_file(folder.state, step.block.index), step.block, job.gradients)
    if job.regional and not job.prunes_from_store:
        for name, gradient in regional_gradients(step.block, step.inputs, step.hidden).items():
            found.setdefault(name, {})[REGIONAL] = gradient
    return found


def _prune_block(job: Job, step: Step, gradients: Mapping[str, Mapping[str, Tensor]]) -> list[Layer]:
    layers = []
    for site, statistics in step.sites():
        for projection in site.projections:
            target = job.targets[projection.name]
            before = projection.weight.clone()
            if target > 0:
                known = statistics.with_gradients(gradients.get(projection.name, {}))
                projection.write(pruned_weight(job, projection.name, before, known, target))
            after = projection.weight
            rows, columns = after.shape
            layers.append(
                Layer(
                    name=projection.name,
                    role=projection.role,
                    block=step.block.index,
                    shape=(rows, columns),
                    target=target,
                    sparsity=float((after == 0).sum()) / after.numel(),
                    loss=_loss(before, after, statistics) if job.recipe.measure.layer_loss else None,
                )
            )
    return layers


def pruned_weight(job: Job, name: str, weight: Tensor, statistics: Statistics, target: float) -> Tensor:
    """The weight `[out, in]` with the fraction `target` removed; an expert without tokens as the recipe says."""
    if not _unseen(statistics):
        return job.pruning.apply(weight, statistics, target)[0]
    remedy = job.prune.unseen_expert
    if remedy == "error":
        raise NumericalError(
            f"{name}: no calibration token was routed to this expert; calibrate on more or other text, or set "
            "`unseen_expert: magnitude` or `unseen_expert: dense`"
        )
    log.warning("%s: no calibration token was routed to this expert, treated by: %s", name, remedy)
    if remedy == "dense":
        return weight
    plain = {"score": registry.build("prune.score", "magnitude"), "solver": registry.build("prune.solver", "mask_only")}
    stand_in = replace(job.pruning, **plain)
    return stand_in.apply(weight, statistics, target)[0]


def _unseen(statistics: Statistics) -> bool:
    """Whether no token reached the projection: then it has no inputs to count and its gradient is zero throughout."""
    silent = any(not bool(gradient.any()) for gradient in statistics.gradients.values())
    return silent or bool(statistics.needs and not statistics.tokens)


def _loss(before: Tensor, after: Tensor, statistics: Statistics) -> float:
    """The share of the output's energy that the change of the weight takes away, on calibration tokens."""

    def energy(matrix: Tensor) -> float:
        return float(((matrix @ statistics.gram) * matrix).sum())

    total = energy(before.float())
    return energy(before.float() - after.float()) / total if total > 0 else 0.0


def committed_layers(records: tuple[dict[str, Any], ...]) -> tuple[Layer, ...]:
    """The layers of all committed blocks."""
    try:
        layers = [layer for record in records for layer in record["layers"]]
        return tuple(Layer(**{**layer, "shape": tuple(layer["shape"])}) for layer in layers)
    except (KeyError, TypeError) as error:
        raise CorruptFile(f"the run's record of a finished block is damaged ({error}): {START_OVER}") from error
