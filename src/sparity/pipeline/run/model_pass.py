"""A pass that trains the whole model, in steps, from the checkpoint that the pass before it left."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparity.checkpoints.recorded_scales import carry_scales
from sparity.checkpoints.shards import write_tensors
from sparity.checkpoints.source import ModuleSource
from sparity.errors import CorruptFile, NumericalError
from sparity.models import Decoder
from sparity.models.block import Projection
from sparity.pipeline.run.export import plain_shard
from sparity.pipeline.run.finished_pass import Done, dense_block
from sparity.pipeline.run.pass_folder import START_OVER, PassFolder
from sparity.pipeline.run.passes import Setting
from sparity.pipeline.run.planned import PlannedPass, PlannedStage
from sparity.pipeline.run.progress import Progress
from sparity.pipeline.run.runtime_files import carry_runtime, publish_fitted, read_fitted, save_fitted
from sparity.pipeline.run.whole_pass import commit_whole
from sparity.stages import Change, ModelStage, Trained
from sparity.visible import logger

log = logger(__name__)

LAST = "training.safetensors"
STEP = "sparity.step"


class Room:
    """Where a training keeps its last checkpoint: one file, replaced as a whole. See `Workspace`."""

    def __init__(self, state: Path, progress: Progress, dense: Callable[[], nn.Module], blocks: Sequence[int]) -> None:
        self.folder, self.blocks = state, blocks
        self._path, self._progress, self._dense = state / LAST, progress, dense
        self._begun = time.perf_counter()

    def dense(self) -> nn.Module:
        """See `Workspace.dense`."""
        return self._dense()

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """See `Workspace.save`."""
        write_tensors(self._path, {**tensors, STEP: torch.tensor(step)})

    def last(self) -> tuple[int, dict[str, Tensor]] | None:
        """See `Workspace.last`."""
        if not self._path.exists():
            return None
        try:
            tensors: dict[str, Tensor] = load_file(self._path)
            return int(tensors.pop(STEP)), tensors
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise CorruptFile(f"{self._path} is damaged ({error}): {START_OVER}") from error

    def progress(self, done: int, total: int) -> None:
        """See `Workspace.progress`."""
        self._progress.block(done, total, time.perf_counter() - self._begun)


def run_training(planned: PlannedPass, setting: Setting, folder: PassFolder, progress: Progress, before: Done) -> Done:
    """Train, and write the checkpoint; what is committed of it already is not done again."""
    (each,) = planned.stages
    stage, opened = each.stage, setting.opened
    assert isinstance(stage, ModelStage)

    blocks = [dense_block(before, index) for index in range(len(opened.decoder))]

    def train() -> dict[str, Any]:
        model = setting.load()
        masks = _masks(opened.decoder, model) if setting.masked or stage.keeps_zeros else {}
        tokens = torch.empty(0, 0, dtype=torch.int64) if opened.tokens is None else opened.tokens
        trained = stage.train(model, masks, tokens, Room(folder.state, progress, setting.dense, blocks)) or Trained()
        for note in trained.notes:
            log.info("%s", note)
        _check(model, opened.decoder, masks, stage.name)
        save_fitted(folder.state, each.place, 0, trained.runtime)
        changes = _write(model, stage.after(opened.decoder, each.draft), folder, stage.name)
        curves = {name: list(map(list, losses.items())) for name, losses in trained.curves.items()}
        told = {"stage": stage.name, "curves": curves, "notes": list(trained.notes)}
        return {"changes": changes, "training": told, "found": dict(trained.found), "adds": bool(trained.runtime)}

    found = commit_whole(planned, setting, folder, progress, len(opened.decoder), train)
    source = setting.previous or getattr(opened.decoder.source, "folder", None)
    if setting.previous is not None:
        carry_runtime(setting.previous, folder.path)
    if source is not None and "values" in stage.preserves:
        carry_scales(source, folder.path)
    runtime = [_published(each, folder)] if found["adds"] else []
    return replace(
        before,
        decisions=(*before.decisions, {**each.draft, **found["found"]}),
        records=(*before.records, *folder.committed.records),
        config={**before.config, **stage.config_changes(opened.decoder)},
        runtime=(*before.runtime, *runtime),
        trainings=(*before.trainings, found["training"]),
    )


def _published(each: PlannedStage, folder: PassFolder) -> dict[str, Any]:
    """The data of a stage that its training left for run time, beside the weights; the entry for config.json."""
    return publish_fitted(each, read_fitted(folder.state, each.place, 1), folder.path)


def _projections(decoder: Decoder, model: nn.Module) -> dict[str, Projection]:
    names = [decoder.block_name(index) for index in range(len(decoder))]
    sites = [site for name in names for site in decoder.family.sites(model.get_submodule(name), name, decoder.config)]
    return {projection.name: projection for site in sites for projection in site.projections}


def _masks(decoder: Decoder, model: nn.Module) -> dict[str, Tensor]:
    return {name: projection.weight != 0 for name, projection in _projections(decoder, model).items()}


def _check(model: nn.Module, decoder: Decoder, masks: Mapping[str, Tensor], stage: str) -> None:
    """Raise `NumericalError` when weights are not finite, or a zero that had to stay came back."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericalError(f"{name}: {stage} left NaN or infinite weights; lower its learning rate")
    projections = _projections(decoder, model)
    for name, mask in masks.items():
        back = int(((projections[name].weight != 0) & ~mask).sum())
        if back:
            raise NumericalError(f"{name}: {stage} says that it keeps zeros, but {back} of an earlier stage came back")


def _write(model: nn.Module, decoder: Decoder, folder: PassFolder, stage: str) -> list[list[dict[str, Any]]]:
    """The trained model as the shards of a checkpoint, a block each; what became of each block's projections."""
    trained = Decoder(decoder.skeleton, ModuleSource(model), decoder.device, decoder.dtype)
    total = len(trained)
    folder.save_shard(plain_shard(1, total + 1), trained.rest())
    changes = []
    for index in range(total):
        with trained.block(index) as block:
            folder.save_shard(plain_shard(index + 2, total + 1), trained.export(block))
            changes.append([asdict(Change.of(stage, projection, index)) for projection in block.projections])
    return changes
