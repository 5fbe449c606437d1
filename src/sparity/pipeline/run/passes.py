"""One pass over a model: its stages decide, then every block in turn is edited and committed before the next begins."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparity.calibration import walk
from sparity.calibration.evidence import Evidence, LiveIndependent, LiveSequential
from sparity.calibration.gradients import gather_gradients, gradient_file, read_gradients
from sparity.calibration.gram_slices import GramFiles
from sparity.calibration.statistics import REGIONAL
from sparity.calibration.store import StatisticsStore
from sparity.checkpoints.recorded_scales import carry_scales, write_scales
from sparity.checkpoints.source import read_header
from sparity.errors import CorruptFile
from sparity.memory import give_back
from sparity.models import Block
from sparity.models.attached_runtime import input_sites
from sparity.pipeline.evidence.dense_statistics import dense_statistics, stored_needs
from sparity.pipeline.evidence.model_evidence import PassEvidence, stored_evidence
from sparity.pipeline.evidence.opened import NO_INPUTS, Opened
from sparity.pipeline.run.block_edits import edit_block
from sparity.pipeline.run.export import plain_shard
from sparity.pipeline.run.finished_pass import Done, dense_block, with_kept
from sparity.pipeline.run.pass_folder import START_OVER, PassFolder
from sparity.pipeline.run.planned import PlannedPass, PlannedStage
from sparity.pipeline.run.progress import Progress
from sparity.pipeline.run.runtime_files import carry_runtime, publish_fitted, read_fitted, read_refined, save_refined
from sparity.processes.group import ALONE
from sparity.stages import BlockStage, Decision, RuntimeStage, Stage
from sparity.stages.order import needs_of


@dataclass(frozen=True)
class Setting:
    """What a pass works with besides its stages.

    Attributes:
        opened: the model, and what it is calibrated on.
        store: the folder that the recipe names for the statistics of the model; None keeps them in the run's own.
        layer_loss: whether the loss of every projection's output is measured.
        masked: whether zeros of an earlier pass must stay.
        previous: the folder of the pass before.
        gram_sums: bytes of sums that Gram matrices in files may take at once; None keeps the matrices in memory.
        threads: the number under which the run began.
        load: gives the whole model as transformers loads it, of its own.
        dense: gives the model that the run began with in the same way.
    """

    opened: Opened
    store: Path | None
    layer_loss: bool
    masked: bool
    threads: int
    load: Callable[[], nn.Module]
    dense: Callable[[], nn.Module]
    previous: Path | None = None
    gram_sums: int | None = None


def run_blocks(planned: PlannedPass, setting: Setting, folder: PassFolder, progress: Progress, before: Done) -> Done:
    """Work on what is not committed yet. Shard 1 holds everything outside the blocks, shard 2 the first block."""
    decoder = setting.opened.decoder
    total, done = len(decoder), folder.committed.blocks
    if done:
        check_finished(folder.path, done, total)
    torch.set_num_threads(setting.threads)
    if done < total:
        first = needs_of(planned.stages[0].stage, setting.layer_loss)
        wanted = stored_needs(first, setting.store is not None)
        store = dense_statistics(setting.opened, wanted, setting.store or folder.state / "statistics", progress)
        torch.set_num_threads(setting.threads)
        decisions = _decide(planned, setting, folder, store, progress)
        progress.phase(planned.words)
        if not done:
            rest: Mapping[str, Tensor] = decoder.rest()
            for each, decision in zip(planned.stages, decisions, strict=True):
                if isinstance(each.stage, BlockStage):
                    rest = each.stage.edit_rest(rest, decision)
            folder.save_shard(plain_shard(1, total + 1), rest)
            give_back()
            setting.opened.group.wait()
        _walk(planned, decisions, setting, folder, store, progress)
    return setting.opened.group.first_does(partial(_done, planned, setting, folder, before))


def _decide(
    planned: PlannedPass, setting: Setting, folder: PassFolder, store: StatisticsStore | None, progress: Progress
) -> list[Decision]:
    """What every stage decides, found out once per folder; what reads no statistics, and trials, are rank 0's."""
    group = setting.opened.group

    def decide(each: PlannedStage, opened: Opened, place: PassFolder) -> Decision:
        with PassEvidence(opened, each.stage, place, store, progress) as evidence:
            model = opened.decoder if each is planned.stages[0] else each.model
            return each.stage.decide(model, evidence)

    for each in planned.stages:
        if group.told(folder.recall(_decision_name(each)) is None):
            needs = each.stage.needs()
            if needs.trials or not needs.decision:
                alone = replace(setting.opened, group=ALONE)
                decision = group.first_does(partial(decide, each, alone, folder.alone))
            else:
                decision = decide(each, setting.opened, folder)
            folder.remember(_decision_name(each), decision)
    return _remembered(planned, folder)


def _remembered(planned: PlannedPass, folder: PassFolder) -> list[Decision]:
    found = [folder.recall(_decision_name(each)) for each in planned.stages]
    if None in found:
        raise CorruptFile(f"{folder.state} lacks what a stage decided: {START_OVER}")
    return [decision for decision in found if decision is not None]


def _decision_name(each: PlannedStage) -> str:
    return f"decision-{each.place}"


def _walk(
    planned: PlannedPass,
    decisions: Sequence[Decision],
    setting: Setting,
    folder: PassFolder,
    store: StatisticsStore | None,
    progress: Progress,
) -> None:
    opened, decoder = setting.opened, setting.opened.decoder
    sources = [_evidence(each.stage, setting, folder, store, progress) for each in planned.stages]
    live = frozenset[str]().union(
        *(source.needs for source in sources if isinstance(source, LiveSequential | LiveIndependent))
    )
    total, done = len(decoder), folder.committed.blocks
    one_by_one = REGIONAL in live or any(each.stage.needs().sequences for each in planned.stages)
    carried = bool(live) or one_by_one
    inputs, hidden, room = opened.inputs(folder, one_by_one) if carried else (NO_INPUTS, None, None)
    started = time.perf_counter()
    files = None if setting.gram_sums is None else GramFiles(folder.state, setting.gram_sums)
    for visit in walk(
        decoder, inputs, start=done, hidden=hidden, room=room, carry=carried, group=opened.group, files=files
    ):
        index = visit.block.index
        record = edit_block(planned, decisions, sources, visit, folder, setting.layer_loss, setting.masked)
        if carried:
            visit.finish()
        if opened.group.first:
            folder.save_shard(plain_shard(index + 2, total + 1), decoder.export(visit.block))
        record["seconds"] = time.perf_counter() - started
        folder.commit(index + 1, visit.hidden if carried and index + 1 < total else None, record)
        progress.block(index + 1, total, record["seconds"])
        started = time.perf_counter()


def _evidence(
    stage: Stage, setting: Setting, folder: PassFolder, store: StatisticsStore | None, progress: Progress
) -> Evidence:
    """Where a stage's statistics come from; gradients of the loss are gathered first where no store has them."""
    needs = needs_of(stage, setting.layer_loss)
    everything = needs.statistics | needs.gradients
    if store is not None and needs.order == "independent" and everything <= store.needs:
        return stored_evidence(store, everything)
    gradients: Any = _no_gradients
    if needs.gradients and store is not None and needs.gradients <= store.needs:
        gradients = partial(store.gradients, needs=needs.gradients)
    elif needs.gradients and setting.opened.tokens is not None:
        progress.phase("gradients")
        decoder, tokens = setting.opened.decoder, setting.opened.tokens
        setting.opened.group.first_does(lambda: gather_gradients(decoder, tokens, needs.gradients, folder.state))
        progress.phase(stage.name)
        gradients = partial(_gathered_gradients, folder.state, needs.gradients)
    if needs.order == "independent":
        return LiveIndependent(needs.statistics, gradients)
    return LiveSequential(needs.statistics, gradients, needs.true_sequential)


def _no_gradients(block: Block) -> dict[str, dict[str, Tensor]]:
    return {}


def _gathered_gradients(state: Path, needs: frozenset[str], block: Block) -> dict[str, dict[str, Tensor]]:
    return read_gradients(gradient_file(state, block.index), block, needs)


def _done(planned: PlannedPass, setting: Setting, folder: PassFolder, before: Done) -> Done:
    """What is known of the run after this pass; the data of its run-time stages is beside its weights then."""
    decoder, records = setting.opened.decoder, folder.committed.records
    if setting.previous is not None:
        carry_runtime(setting.previous, folder.path)
        carry_scales(setting.previous, folder.path)
    runtime = [
        publish_fitted(each, _refined(each, setting, folder), folder.path)
        for each in planned.stages
        if isinstance(each.stage, RuntimeStage)
    ]
    for each in planned.stages:
        if isinstance(each.stage, BlockStage) and each.stage.records:
            write_scales(folder.path, each.place, each.stage.name, read_fitted(folder.state, each.place, len(decoder)))
    sizes = [{dimension: len(units) for dimension, units in record["kept"].items()} for record in records]
    done = Done(
        decisions=(*before.decisions, *_remembered(planned, folder)),
        records=(*before.records, *records),
        config={**before.config, **decoder.config_changes(sizes)},
        kept=before.kept,
        runtime=(*before.runtime, *runtime),
        trainings=before.trainings,
    )
    for index, record in enumerate(records):
        done = with_kept(done, decoder.block_name(dense_block(done, index)), record["kept"])
    return done


def _refined(each: PlannedStage, setting: Setting, folder: PassFolder) -> Mapping[str, Tensor]:
    """The data of all blocks of a run-time stage, gone over with the whole model where it asks for that."""
    stage, data = each.stage, read_fitted(folder.state, each.place, len(setting.opened.decoder))
    assert isinstance(stage, RuntimeStage)
    tokens = setting.opened.tokens
    if not stage.refines or tokens is None:
        return data
    known = read_refined(folder.state, each.place)
    if known is not None:
        return known
    torch.set_num_threads(setting.threads)
    model = setting.load()
    found = stage.refine(model, input_sites(model), data, tokens)
    save_refined(folder.state, each.place, found)
    return found


def check_finished(folder: Path, blocks: int, total: int) -> None:
    """Raise `CorruptFile` when a shard that was committed is missing or truncated."""
    if blocks > total:
        raise CorruptFile(f"{folder} records {blocks} finished blocks of {total}: {START_OVER}")
    for number in range(1, blocks + 2):
        try:
            read_header(folder / plain_shard(number, total + 1))
        except CorruptFile as error:
            raise CorruptFile(f"a finished shard of the run is lost ({error}): {START_OVER}") from error
