"""Statistics of the model that a pass opens which are read more than once, or kept for other runs."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparity.calibration import walk
from sparity.calibration.gradients import gather_gradients
from sparity.calibration.regional import regional_gradients
from sparity.calibration.statistics import GRADIENTS, REGIONAL
from sparity.calibration.store import StatisticsStore
from sparity.errors import RunConflict
from sparity.files import read_json_object
from sparity.pipeline.evidence.opened import Opened
from sparity.pipeline.run.pass_folder import PassFolder
from sparity.pipeline.run.progress import Progress
from sparity.pipeline.run.run_folder import STATE, RunFolder
from sparity.pipeline.run.shared_folder import shared
from sparity.stages import Needs


def with_small(needs: frozenset[str]) -> frozenset[str]:
    """What a store of these statistics holds: the small ones cost nothing, and other methods may want them."""
    return needs | {"mean", "column_norm"} if needs else needs


def stored_needs(needs: Needs, asked: bool) -> frozenset[str]:
    """The statistics to keep on disk for a stage: because it reads them twice, or because the recipe `asked` for it."""
    found = needs.decision if needs.repeated or asked else frozenset[str]()
    if needs.order == "independent" and (found or asked):
        found |= needs.statistics | needs.gradients
    return with_small(found)


def dense_statistics(opened: Opened, needs: frozenset[str], path: Path, progress: Progress) -> StatisticsStore | None:
    """The store in a folder, filled unless it is already; None where nothing is needed.

    Gathering is a run of its own, which continues where a killed one stopped.

    Raises:
        RunConflict: the folder, or an unfinished one beside it, is of something else.
        CorruptFile: the store is damaged.
    """
    if not needs:
        return None
    identity, group = opened.identity(), opened.group
    wanted, force = group.first_does(partial(_missing, path, identity, needs))
    if wanted:
        run = {"statistics of": identity, "needs": sorted(wanted)}
        with shared(group, path, RunFolder.open(path, run, force=force, resume=True)) as gathering:
            progress.phase("statistics")
            torch.set_num_threads(gathering.threads)
            _gather(opened, gathering, wanted, progress)
            if group.first:
                StatisticsStore(gathering.path).close(identity, wanted)
                gathering.publish()
    return StatisticsStore.open(path, identity)


def _missing(path: Path, identity: dict[str, Any], needs: frozenset[str]) -> tuple[frozenset[str], bool]:
    """What is to be gathered, nothing where the store has it all, and whether something is replaced by that."""
    if path.exists():
        store = StatisticsStore.open(path, identity)
        if needs <= store.needs:
            return frozenset(), False
        store.refuse_others()
        needs |= store.needs
    unfinished = _unfinished(path, identity)
    return needs | unfinished, path.exists() or bool(unfinished)


def _gather(opened: Opened, gathering: PassFolder, needs: frozenset[str], progress: Progress) -> None:
    decoder, group = opened.decoder, opened.group
    store, done = StatisticsStore(gathering.path), gathering.committed.blocks
    gradients = needs & frozenset(GRADIENTS)
    if gradients:
        assert opened.tokens is not None
        group.first_does(partial(gather_gradients, decoder, opened.tokens, gradients, gathering.path))
    if done == len(decoder):
        return
    of_inputs = needs - gradients - {REGIONAL}
    inputs, hidden, room = opened.inputs(gathering, REGIONAL in needs)
    started = time.perf_counter()
    for visit in walk(decoder, inputs, start=done, hidden=hidden, room=room, group=group):
        index = visit.block.index
        if REGIONAL in needs and group.first:
            store.save_regional(index, regional_gradients(visit.block, inputs, visit.hidden))
        gathered = visit.gather(visit.block.sites, of_inputs, keep_outputs=True)
        found = {site.name: statistics for site, statistics in gathered}
        if group.first:
            store.save(index, found)
        visit.finish()
        seconds = time.perf_counter() - started
        last = index + 1 == len(decoder)
        gathering.commit(index + 1, None if last else visit.hidden, {"seconds": seconds, "changes": []})
        progress.block(index + 1, len(decoder), seconds)
        started = time.perf_counter()


def _unfinished(path: Path, identity: dict[str, Any]) -> frozenset[str]:
    """What a gathering that was killed was to hold: this one goes on with it, or starts over when it needs more."""
    manifest = path.with_name(f"{path.name}.partial") / STATE / "manifest.json"
    if not manifest.is_file():
        return frozenset()
    recorded = read_json_object(manifest).get("identity")
    if not isinstance(recorded, dict) or recorded.get("statistics of") != identity:
        place = manifest.parent.parent
        raise RunConflict(f"{place} holds something else that is unfinished: choose another store, or delete it")
    return frozenset(map(str, recorded.get("needs") or ()))
