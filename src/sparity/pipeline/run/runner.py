"""Run a recipe from beginning to end."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparity.errors import InvalidInput
from sparity.files import expand
from sparity.measure.data.machine import watch_peak_memory
from sparity.measure.data.report import Effort, Report
from sparity.models.loading import load
from sparity.pipeline.evidence.allocation import with_measured_targets
from sparity.pipeline.evidence.dense_statistics import dense_statistics
from sparity.pipeline.run.export import write_companions, write_results
from sparity.pipeline.run.job import Job, prepare
from sparity.pipeline.run.measuring import measure
from sparity.pipeline.run.packing import is_packed, pack_in_place, realised_sparsity
from sparity.pipeline.run.passes import committed_layers, prune_blocks
from sparity.pipeline.run.progress import Progress, Silence
from sparity.pipeline.run.result_folder import output_folder, refuse_to_replace, working_places
from sparity.pipeline.run.run_folder import RunFolder
from sparity.recipe import Recipe


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


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    model: str | Path | nn.Module | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
) -> Result:
    """Prune a model as a recipe says, measure it beside the dense one, and save it.

    Args:
        recipe: a YAML file, a dictionary or a `Recipe`.
        model: a folder, a Hugging Face name or a model in memory (not changed), in place of the recipe's.
        output: the folder of the result, in place of the recipe's. Without one the result lies in a temporary folder
            that lives as long as the returned object.
        device: "cpu", "cuda", ... or "auto".
        force: replace an existing output, or start an unfinished run over.
        resume: continue an unfinished run; a finished part is not done again, and the result is bit-identical.

    Raises:
        SparityError: bad input, a conflict with another run, numerical trouble or a full disk; finished blocks stay.

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
        Recipe.read(recipe), Silence(), model=model, output=output, device=device, force=force, resume=resume
    )


def execute(
    recipe: Recipe,
    progress: Progress,
    *,
    model: str | Path | nn.Module | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
) -> Result:
    """`run` for a checked recipe, with a progress that is told how the run gets on."""
    progress.phase("checking")
    job = prepare(recipe, model, device)
    named = recipe.output.path if output is None else output
    path, temporary = output_folder(named, "model", resume)
    check_output(job, path)
    threads = torch.get_num_threads()
    try:
        with RunFolder.open(path, job.identity(), force, resume) as folder:
            if resume and not folder.resumed:
                progress.phase("nothing to resume, beginning")
            report = _work(job, folder, progress)
            folder.publish()
    finally:
        torch.set_num_threads(threads)
    return Result(report, path, job.measured_on, temporary)


def check_output(job: Job, path: Path) -> None:
    """Refuse an output that would take the place of the dense model, or of the store that keeps its statistics."""
    refuse_to_replace(job.folder, path)
    kept = job.recipe.calibration.store if job.recipe.calibration else None
    if kept is not None:
        store, places = expand(kept).resolve(), working_places(path)
        if any(store.is_relative_to(place) or place.is_relative_to(store) for place in places):
            raise InvalidInput(f"calibration.store: {kept} and the output {path} must lie apart")


def _work(job: Job, folder: RunFolder, progress: Progress) -> Report:
    progress.phase("pruning")
    begun, before = time.perf_counter(), folder.progress
    with watch_peak_memory() as peak:
        if is_packed(folder.path):  # every block is done, and its plain shards may be gone
            job = replace(job, targets=folder.recall("targets") or job.targets)
        else:
            store = dense_statistics(job, folder, progress)
            job = with_measured_targets(job, folder, store, progress)
            prune_blocks(job, folder, progress, store)
            write_companions(job, folder.path)
        peak_memory = peak()
    records = folder.progress.records
    seconds = sum(record["seconds"] for record in before.records) + time.perf_counter() - begun
    effort = Effort(
        seconds=seconds,
        peak_memory=peak_memory,
        calibration_tokens=0 if job.tokens is None else job.tokens.numel(),
        threads=torch.get_num_threads(),
        seconds_per_block=tuple(record["seconds"] for record in records),
    )
    if job.recipe.output.format == "packed":
        progress.phase("packing")
        pack_in_place(folder.path, job.recipe.output.values, job.recipe.output.prefer)
    layers = committed_layers(records)
    if job.recipe.output.values == "int8":
        realised = realised_sparsity(folder.path)
        layers = tuple(replace(layer, sparsity=realised[layer.name]) for layer in layers)
    progress.phase("measuring")
    report = measure(job, folder.path, layers, effort)
    write_results(job, folder.path, report)
    return report
