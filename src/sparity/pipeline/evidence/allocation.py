"""Targets that rest on data: decided once per run, before the first block is pruned."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sparity.budgets.base import MeasuredBudget
from sparity.calibration import walk
from sparity.calibration.statistics import GRADIENTS, REGIONAL
from sparity.calibration.store import StatisticsStore
from sparity.pipeline.evidence.hidden_states import block_inputs
from sparity.pipeline.evidence.targets import decide_targets, observe
from sparity.pipeline.evidence.trials import Trials
from sparity.pipeline.run.job import Job
from sparity.pipeline.run.passes import NO_INPUTS
from sparity.pipeline.run.progress import Progress
from sparity.pipeline.run.run_folder import RunFolder


def with_measured_targets(job: Job, folder: RunFolder, store: StatisticsStore | None, progress: Progress) -> Job:
    """The job with the targets that its budget finds in the dense model; measured once per run folder."""
    if not (job.budget.needs or job.budget.measures or job.pruning.across_layers):
        return job
    targets = folder.recall("targets")
    if targets is None:
        torch.set_num_threads(folder.threads)
        if job.pruning.across_layers:
            scores = partial(_scores, job, store)
            targets = decide_targets(job.prune, job.pruning, job.decoder, scores=scores)
        elif job.budget.measures:
            progress.phase("measuring what sparsity costs")
            assert job.tokens is not None
            samples = job.budget.samples if isinstance(job.budget, MeasuredBudget) else None
            with Trials(job, folder, store, job.tokens[:samples]) as trials:
                targets = decide_targets(job.prune, job.pruning, job.decoder, objective=trials.kl)
            progress.phase("pruning")
        else:
            targets = _observed_targets(job, folder, store)
        folder.remember("targets", targets)
    return replace(job, targets=targets)


def _observed_targets(job: Job, folder: RunFolder, store: StatisticsStore | None) -> dict[str, float]:
    inputs, _, _ = block_inputs(job, folder) if store is None else NO_INPUTS
    evidence = observe(job.budget, job.decoder, inputs, None if store is None else store.read)
    return decide_targets(job.prune, job.pruning, job.decoder, evidence)


def _scores(job: Job, store: StatisticsStore | None) -> Iterator[tuple[str, Tensor]]:
    """Every projection of the dense model with its scores; an expert that saw no token has none."""
    gradients = frozenset(job.pruning.score.needs) & {*GRADIENTS, REGIONAL}
    for step in walk(job.decoder, NO_INPUTS[0], (), known=None if store is None else store.read):
        found = store.gradients(step.block, gradients) if gradients and store is not None else {}
        for site, statistics in step.sites():
            for projection in site.projections:
                known = statistics.with_gradients(found.get(projection.name, {}))
                if statistics.tokens or store is None:
                    yield projection.name, job.pruning.score.score(projection.weight, known)
