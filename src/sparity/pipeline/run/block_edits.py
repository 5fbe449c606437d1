"""One block in the hands of a pass's stages, on one rank or shared out among several."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from sparity.calibration import Visit
from sparity.calibration.evidence import Evidence
from sparity.errors import NumericalError, SparityError
from sparity.models import Block
from sparity.models.dimensions import Dimension, cut_matrix, cuts_of
from sparity.pipeline.run.pass_folder import PassFolder
from sparity.pipeline.run.planned import PlannedPass
from sparity.pipeline.run.runtime_files import read_carried, save_carried, save_fitted
from sparity.processes.group import Group
from sparity.stages import BlockEdit, BlockStage, Decision, RuntimeStage
from sparity.visible import logger

log = logger(__name__)

Losses = dict[str, float]


def edit_block(
    planned: PlannedPass,
    decisions: Sequence[Decision],
    sources: Sequence[Evidence],
    visit: Visit,
    folder: PassFolder,
    layer_loss: bool,
    masked: bool,
) -> dict[str, Any]:
    """Let every stage of the pass have the block; what they did to it, as JSON.

    Args:
        planned: the pass.
        decisions: of each of its stages.
        sources: of what each is told.
        visit: of the block, on the walk.
        folder: of the pass.
        layer_loss: whether the loss of every projection's output is measured.
        masked: whether zeros of an earlier pass must stay.

    Raises:
        NumericalError: a zero that had to stay came back.
        SparityError: the ranks of a group came to different weights.
    """
    record: dict[str, Any] = {"changes": [], "kept": {}}
    group = visit.group
    for each, decision, source in zip(planned.stages, decisions, sources, strict=True):
        stage = each.stage
        measured = layer_loss and isinstance(stage, BlockStage)
        losses: dict[str, float] | None = {} if measured else None
        apart = isinstance(stage, BlockStage) and stage.apart
        evidence = source.for_block(visit, losses, apart)
        if masked:
            evidence.masks = {p.name: p.weight != 0 for p in visit.block.projections}
        model = each.model
        if isinstance(stage, BlockStage):
            with _warnings_of(group) as warnings:
                edit = stage.edit(model, evidence, decision)
            if apart:
                edit, losses = _united(edit, losses, warnings, group)
            visit.block = edit.block
            _check_same(edit.block, group)
            for note in edit.notes if group.first else ():
                log.warning("%s", note)
            if masked and "mask" in stage.preserves:
                _check_masks(stage, edit, evidence.masks, model.dimensions(visit.block.index))
            if stage.records and group.first:
                save_fitted(folder.state, each.place, visit.block.index, edit.extra)
            record["changes"] += [asdict(_with_loss(change, losses or {})) for change in edit.changes]
            record["kept"] = {**record["kept"], **_composed(record["kept"], edit.kept)}
        elif isinstance(stage, RuntimeStage):
            evidence.before = read_carried(folder.state, each.place, visit.block.index)
            fit = stage.fit(model, evidence, decision)
            if group.first:
                save_fitted(folder.state, each.place, visit.block.index, fit.tensors)
                save_carried(folder.state, each.place, visit.block.index, fit.carried)
            record["changes"] += [asdict(change) for change in fit.changes]
        masked |= "mask" in stage.relies_on and isinstance(stage, BlockStage)
    return record


def _with_loss(change: Any, losses: Mapping[str, float]) -> Any:
    same = change.shape_before == change.shape_after
    return replace(change, loss=losses.get(change.name)) if same else change


def _composed(before: Mapping[str, list[int]], cut: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """A block's further cuts in units of the model that the pass opened."""
    found = {}
    for dimension, units in cut.items():
        earlier = before.get(dimension)
        found[dimension] = units.tolist() if earlier is None else [earlier[unit] for unit in units.tolist()]
    return found


def _check_masks(
    stage: BlockStage, edit: BlockEdit, masks: Mapping[str, Tensor], dimensions: Sequence[Dimension]
) -> None:
    """Raise `NumericalError` when a zero that had to stay came back."""
    for projection in edit.block.projections:
        cuts = cuts_of(dimensions, projection.name)
        mask = cut_matrix(masks[projection.name], cuts, edit.kept)
        back = int(((projection.weight != 0) & ~mask).sum())
        if back:
            raise NumericalError(
                f"{projection.name}: {stage.name} says that it keeps zeros, but {back} of an earlier stage came back: "
                "this is a fault of the stage; leave it out, or put it before"
            )


@contextmanager
def _warnings_of(group: Group) -> Iterator[list[str]]:
    """What is logged on ranks that say nothing themselves, in visible text."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, whole = Keep(logging.WARNING), logger("sparity")
    if not group.first:
        whole.addHandler(handler)
    try:
        yield found
    finally:
        whole.removeHandler(handler)


def _united(
    edit: BlockEdit, losses: Losses | None, warnings: list[str], group: Group
) -> tuple[BlockEdit, Losses | None]:
    """What all ranks did to the block, each to its own sites, in the order of the projections.

    Rank 0 logs the warnings of all.
    """
    if group.size == 1:
        return edit, losses
    place = {projection.name: number for number, projection in enumerate(edit.block.projections)}
    found = group.collected((edit.changes, edit.notes, dict(edit.extra), losses, warnings))
    for warning in (each for part in found for each in part[4] if group.first):
        log.warning("%s", warning)
    changes = sorted((change for part in found for change in part[0]), key=lambda change: place[change.name])
    notes = tuple(note for part in found for note in part[1])
    beside = {name: tensor for part in found for name, tensor in part[2].items()}
    extra = {name: beside[name] for name in sorted(beside, key=lambda name: place[name.rpartition(".")[0]])}
    if losses is not None:
        losses = {name: loss for part in found for name, loss in (part[3] or {}).items()}
    return replace(edit, changes=tuple(changes), notes=notes, extra=extra), losses


def _check_same(block: Block, group: Group) -> None:
    """Raise `SparityError` when the ranks' weights differ: on unlike machines a result would depend on their number."""
    if group.size == 1:
        return
    digest = hashlib.sha256()
    for projection in block.projections:
        digest.update(projection.weight.contiguous().cpu().view(torch.uint8).numpy().data)
    found = group.collected(digest.hexdigest())
    if len(set(found)) > 1:
        others = ", ".join(str(rank) for rank, other in enumerate(found) if other != found[0])
        raise SparityError(
            f"{block.name}: rank {others} came to other weights than rank 0: the processes must run on like "
            "processors with the same number of threads (OMP_NUM_THREADS)"
        )
