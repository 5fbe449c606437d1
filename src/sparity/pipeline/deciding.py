"""Targets that rest on data: decided once per run, before the first block is pruned."""

from dataclasses import replace

import torch

from sparity.calibration.store import StatisticsStore
from sparity.pipeline.folder import RunFolder
from sparity.pipeline.inputs import block_inputs
from sparity.pipeline.job import Job
from sparity.pipeline.pruning import NO_INPUTS
from sparity.pipeline.targets import decide_targets, observe


def with_measured_targets(job: Job, folder: RunFolder, store: StatisticsStore | None) -> Job:
    """The job with the targets that its budget finds in the dense model; measured once per run folder."""
    if not job.budget.needs:
        return job
    targets = folder.recall("targets")
    if targets is None:
        torch.set_num_threads(folder.threads)
        inputs, _, _ = block_inputs(job, folder) if store is None else NO_INPUTS
        evidence = observe(job.budget, job.decoder, inputs, None if store is None else store.read)
        targets = decide_targets(job.prune, job.pruning, job.decoder, evidence)
        folder.remember("targets", targets)
    return replace(job, targets=targets)
