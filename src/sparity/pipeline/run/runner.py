"""Run a recipe from beginning to end."""

import copy
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparity.errors import InvalidInput, wrong_input
from sparity.measure.data.machine import watch_peak_memory
from sparity.measure.data.report import Effort, Report
from sparity.memory import freed_at_once
from sparity.models import Decoder
from sparity.models.loading import load, load_plain
from sparity.pipeline.evidence.opened import Opened
from sparity.pipeline.run import finished_pass
from sparity.pipeline.run.export import finished_report, write_companions, write_config, write_results
from sparity.pipeline.run.finished_pass import Done
from sparity.pipeline.run.job import Job, prepare
from sparity.pipeline.run.measuring import measure, measure_quality
from sparity.pipeline.run.model_pass import run_training
from sparity.pipeline.run.packing import is_exact, is_packed, pack_in_place, realised_zeros
from sparity.pipeline.run.pass_folder import PassFolder
from sparity.pipeline.run.passes import Setting, run_blocks
from sparity.pipeline.run.planned import PlannedPass, fitted
from sparity.pipeline.run.planned_memory import gram_widths, plan_memory
from sparity.pipeline.run.progress import Progress, Silence
from sparity.pipeline.run.reshape_pass import run_reshaping
from sparity.pipeline.run.result_folder import output_folder, refuse_to_replace, working_places
from sparity.pipeline.run.run_folder import RunFolder
from sparity.pipeline.run.shared_folder import agree, shared
from sparity.processes.group import ALONE, Group
from sparity.recipe import Recipe
from sparity.stages import Change, ModelStage, ShapeStage


@dataclass(frozen=True)
class Result:
    """A finished run: what was measured and where the model lies."""

    report: Report
    path: Path
    _device: str = "cpu"
    _keep_alive: Any = field(default=None, repr=False)  # the temporary folder, when no output was named

    def model(self) -> Any:
        """The sparse model, loaded from `path` by transformers."""
        return load(self.path, device=self._device)

    @property
    def accepted(self) -> bool:
        """Whether every limit of the recipe's `accept` section was kept."""
        return self.report.accepted


@wrong_input()
def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    model: str | Path | nn.Module | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    keep_passes: bool = False,
    memory: int | str | None = None,
) -> Result:
    """Take a model through the stages of a recipe, measure it beside the dense one, and save it.

    Args:
        recipe: a YAML file, a dictionary or a `Recipe`.
        model: a folder, a Hugging Face name or a model in memory (not changed), in place of the recipe's.
        output: the folder of the result, in place of the recipe's. Without one the result lies in a temporary folder
            that lives as long as the returned object.
        device: "cpu", "cuda", ... or "auto".
        force: replace an existing output, or start an unfinished run over.
        resume: continue an unfinished run; a finished part is not done again, and the result is bit-identical. A run
            whose recipe changed only in a later stage starts there.
        keep_passes: keep what every pass but the last has made in `OUTPUT.passes`, for later runs to that output.
        memory: bytes, or such as "5GB", that the run may take beside Python and PyTorch, measuring not counted. Gram
            matrices are then in files where memory has no room for them; the result is bit-identical.

    Raises:
        SparityError: bad input, too little memory, a conflict with another run, numerical trouble or a full disk;
            finished blocks stay.

    Example:
        >>> import sparity
        >>> recipe = {
        ...     "model": "zoo:llama",
        ...     "stages": [{"prune": {"score": "magnitude", "sparsity": 0.5}}],
        ...     "measure": {"perplexity": ["python-docs:held-out"], "window": 128, "windows": 2, "speed": None},
        ... }
        >>> result = sparity.run(recipe)  # output="OUT" keeps the folder
        >>> candidate = result.report.candidates[0]
        >>> round(candidate.sparsity, 2), candidate.quality[0].change > 0
        (0.5, True)
        >>> model = result.model()
    """
    return execute(
        Recipe.read(recipe), Silence(), model=model, output=output, device=device, force=force, resume=resume,
        keep_passes=keep_passes, memory=memory,
    )  # fmt: skip


def execute(
    recipe: Recipe,
    progress: Progress,
    *,
    model: str | Path | nn.Module | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    keep_passes: bool = False,
    memory: int | str | None = None,
    group: Group = ALONE,
) -> Result:
    """`run` for a checked recipe, with a listener that is told how the run gets on.

    Every rank of a group calls this with the same arguments, and gets the same result; rank 0 alone writes.
    """
    progress.phase("checking")
    job = prepare(recipe, model, device)
    named = recipe.output.path if output is None else output
    path, temporary = output_folder(named, "model", resume)
    check_output(job, path)
    if memory is not None and group.size > 1:
        raise InvalidInput("memory: a limit is kept by a process of its own; leave it out, or run without torchrun")
    sums = None if memory is None else plan_memory(job, memory).sums
    chain = tuple(planned.name for planned in job.passes[:-1])
    agree(group, {**job.identity(), "output": str(path.absolute()), "options": [force, resume, keep_passes]})
    working = RunFolder.working(path, job.identity(), force, resume, chain)
    limited = nullcontext() if memory is None else freed_at_once()
    with limited, shared(group, path, working) as folder:
        if folder.finished:
            return Result(finished_report(path), path, job.measured_on, temporary)
        if resume and not folder.resumed:
            progress.phase("nothing to resume, beginning")
        report = _work(job, folder, progress, keep_passes, sums, group)
    return Result(report or finished_report(path), path, job.measured_on, temporary)


def check_output(job: Job, path: Path) -> None:
    """Refuse an output that would take the place of the dense model, or of the store that keeps its statistics."""
    refuse_to_replace(job.folder, path)
    if job.store is not None:
        store, places = job.store.resolve(), working_places(path)
        if any(store.is_relative_to(place) or place.is_relative_to(store) for place in places):
            kept = job.recipe.calibration.store if job.recipe.calibration else None
            raise InvalidInput(f"calibration.store: {kept} and the output {path} must lie apart")


def _work(
    job: Job, folder: RunFolder, progress: Progress, keep_passes: bool, sums: int | None, group: Group
) -> Report | None:
    """All of a run, with so many bytes of Gram matrices' sums at once; the report, where rank 0 is told of it."""
    begun, before = time.perf_counter(), folder.committed
    with watch_peak_memory() as peak:
        done = group.first_does(lambda: _packed(folder))
        if done is None:
            done = _passes(job, folder, progress, keep_passes, sums, group)
            group.first_does(lambda: write_companions(job, done, folder.path))
            folder.remember("done", done.to_dict())
        peak_memory = peak()
    seconds = sum(record["seconds"] for record in before.records) + time.perf_counter() - begun
    effort = Effort(
        seconds=seconds,
        peak_memory=peak_memory,
        calibration_tokens=0 if job.tokens is None else job.tokens.numel(),
        threads=torch.get_num_threads(),
        seconds_per_block=done.seconds_per_block,
    )
    changes = group.first_does(lambda: _packed_changes(job, done, folder, progress))
    progress.phase("measuring")
    quality = measure_quality(job, folder.path, group)
    if not group.first:
        return None
    report = measure(job, folder.path, done, changes, effort, quality)
    write_results(job, done, changes, folder.path, report)
    return report


def _packed(folder: RunFolder) -> Done | None:
    """What was done, where every block is and its plain shards may be gone."""
    recalled = folder.recall("done")
    return Done.read(recalled) if is_packed(folder.path) and recalled is not None else None


def _packed_changes(job: Job, done: Done, folder: RunFolder, progress: Progress) -> tuple[Change, ...]:
    """Pack the result where the recipe says so; what was changed, with the zeros that are in it then."""
    output = job.recipe.output
    if output.format == "packed":
        progress.phase("packing")
        pack_in_place(folder.path, output)
    if is_exact(output):
        return done.changes
    realised = realised_zeros(folder.path)
    return tuple(replace(change, zeros=realised.get(change.name, change.zeros)) for change in done.changes)


def _passes(job: Job, folder: RunFolder, progress: Progress, keep: bool, sums: int | None, group: Group) -> Done:
    """Everything that the passes do; finished ones, here or in the folder of kept ones, are not done again."""
    done, start, previous = group.first_does(lambda: _finished(job, folder))
    for planned in job.passes[start:]:
        decoder = job.decoder
        if previous is not None:
            decoder = Decoder.open(previous, job.device, job.decoder.dtype)
            planned = fitted(planned, decoder)
        setting = Setting(
            opened=Opened(decoder, job.tokens, job.batch, group),
            store=job.store if planned.number == 1 else None,
            layer_loss=job.recipe.measure.layer_loss,
            masked=any("mask" in each.stage.relies_on for each in job.stages[: planned.stages[0].place]),
            threads=folder.threads,
            load=partial(_own_model, job, previous),
            dense=partial(_own_model, job, None),
            previous=previous,
            gram_sums=sums if gram_widths(planned, job) else None,
        )
        place: PassFolder = folder
        if not planned.last:
            begun = group.first_does(partial(finished_pass.begin, folder.passes(keep) / planned.name))
            place = PassFolder(begun.path, begun.state, group)
        done = _worked(planned, setting, place, progress, done)
        if not planned.last:
            group.first_does(partial(_finish, job, planned, folder, place.path, done, previous))
            previous = place.path
    return done


def _worked(planned: PlannedPass, setting: Setting, place: PassFolder, progress: Progress, done: Done) -> Done:
    """A pass; what holds the whole model is rank 0's work."""
    stage, group = planned.stages[0].stage, setting.opened.group
    if not isinstance(stage, ModelStage | ShapeStage):
        return run_blocks(planned, setting, place, progress, done)
    work = run_training if isinstance(stage, ModelStage) else run_reshaping
    alone = replace(setting, opened=replace(setting.opened, group=ALONE))
    return group.first_does(lambda: work(planned, alone, place.alone, progress, done))


def _finish(job: Job, planned: PlannedPass, folder: RunFolder, place: Path, done: Done, previous: Path | None) -> None:
    """Make a pass final that is not the last, and remove the one before it, unless that is kept."""
    write_config(job, done, place)
    finished_pass.finish(place, planned.key, done)
    if previous is not None and previous.parent == folder.passes(keep=False):
        shutil.rmtree(previous)


def _own_model(job: Job, previous: Path | None) -> nn.Module:
    """The model that a pass opens, to be changed: from the pass before, or the dense one."""
    if previous is None and job.module is not None:
        return copy.deepcopy(job.module).to(job.device, job.decoder.dtype)
    loaded: nn.Module = load_plain(previous or job.name, job.device, job.decoder.dtype)
    return loaded


def _finished(job: Job, folder: RunFolder) -> tuple[Done, int, Path | None]:
    """What the last finished pass and those before it did, how many they are, and its folder."""
    for number in reversed(range(1, len(job.passes))):
        planned = job.passes[number - 1]
        for root in (folder.passes(keep=False), folder.passes(keep=True)):
            done = finished_pass.finished(root / planned.name, planned.key)
            if done is not None:
                return done, number, root / planned.name
    return Done(), 0, None
