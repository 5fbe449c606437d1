"""Statistics of the dense model that are read more than once, or kept for other runs."""

import time
from pathlib import Path

import torch

from sparity.calibration import walk
from sparity.calibration.gradients import gather_gradients
from sparity.calibration.regional import regional_gradients
from sparity.calibration.statistics import GRADIENTS, REGIONAL
from sparity.calibration.store import StatisticsStore
from sparity.calibration.tokens import token_hash
from sparity.errors import RunConflict
from sparity.files import expand, read_json_object
from sparity.pipeline.evidence.hidden_states import block_inputs
from sparity.pipeline.run.job import Job, with_small
from sparity.pipeline.run.progress import Progress
from sparity.pipeline.run.run_folder import STATE, RunFolder


def dense_statistics(
    job: Job, folder: RunFolder, progress: Progress, needs: frozenset[str] | None = None
) -> StatisticsStore | None:
    """The store that the job reads, filled unless it is already; None for a job that reads none.

    It is the folder that the recipe names, or one in the run's own state. Gathering is a run of its own, which
    continues where a killed one stopped. `needs` takes the place of what the job would read by itself.

    Raises:
        RunConflict: the folder, or an unfinished one beside it, is of something else.
        CorruptFile: the store is damaged.
    """
    needs = job.stored_needs if needs is None else with_small(needs)
    if not needs:
        return None
    assert job.tokens is not None
    kept = job.recipe.calibration.store if job.recipe.calibration else None
    path = folder.state / "statistics" if kept is None else expand(kept)
    identity = {
        "model": job.decoder.source.fingerprint(),
        "dtype": str(job.decoder.dtype),
        "calibration tokens": token_hash(job.tokens),
    }
    if path.exists():
        store = StatisticsStore.open(path, identity)
        if needs <= store.needs:
            return store
        store.refuse_others()
        needs |= store.needs
    unfinished = _unfinished(path, identity)
    needs |= unfinished
    run = {"statistics of": identity, "needs": sorted(needs)}
    with RunFolder.open(path, run, force=path.exists() or bool(unfinished), resume=True) as gathering:
        progress.phase("statistics")
        torch.set_num_threads(gathering.threads)
        _gather(job, gathering, needs, progress)
        StatisticsStore(gathering.path).close(identity, needs)
        gathering.publish()
    progress.phase("pruning")
    return StatisticsStore.open(path, identity)


def _gather(job: Job, gathering: RunFolder, needs: frozenset[str], progress: Progress) -> None:
    store, done = StatisticsStore(gathering.path), gathering.progress.blocks
    gradients = needs & frozenset(GRADIENTS)
    if gradients:
        assert job.tokens is not None
        gather_gradients(job.decoder, job.tokens, gradients, gathering.path)
    if done == len(job.decoder):
        return
    of_inputs = needs - gradients - {REGIONAL}
    inputs, hidden, room = block_inputs(job, gathering, REGIONAL in needs)
    started = time.perf_counter()
    for step in walk(job.decoder, inputs, of_inputs, order="independent", start=done, hidden=hidden, room=room):
        if REGIONAL in needs:
            store.save_regional(step.block.index, regional_gradients(step.block, inputs, step.hidden))
        store.save(step.block.index, {site.name: statistics for site, statistics in step.sites()})
        step.finish()
        finished = step.block.index + 1
        seconds = time.perf_counter() - started
        last = finished == len(job.decoder)
        gathering.commit(finished, None if last else step.hidden, {"seconds": seconds, "layers": []})
        progress.block(finished, len(job.decoder), seconds)
        started = time.perf_counter()


def _unfinished(path: Path, identity: dict[str, str]) -> frozenset[str]:
    """What a gathering that was killed was to hold: this one goes on with it, or starts over when it needs more."""
    manifest = path.with_name(f"{path.name}.partial") / STATE / "manifest.json"
    if not manifest.is_file():
        return frozenset()
    recorded = read_json_object(manifest).get("identity")
    if not isinstance(recorded, dict) or recorded.get("statistics of") != identity:
        place = manifest.parent.parent
        raise RunConflict(f"{place} holds something else that is unfinished: choose another store, or delete it")
    return frozenset(map(str, recorded.get("needs") or ()))
