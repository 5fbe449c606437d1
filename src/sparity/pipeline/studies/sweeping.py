"""Run a sweep: every combination is an ordinary run, of which the measurements stay and the weights do not."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparity.calibration.tokens import token_hash
from sparity.errors import CorruptFile, InvalidInput, NumericalError, SparityError, UnsupportedModel, wrong_input
from sparity.files import write_json, write_text
from sparity.measure.data import machine
from sparity.measure.data.plain import plain
from sparity.measure.data.sweep_report import Row, SweepReport
from sparity.measure.show.page_sweep import render_sweep
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.pass_folder import PassFolder
from sparity.pipeline.run.progress import Progress, Silence
from sparity.pipeline.run.result_folder import output_folder
from sparity.pipeline.run.run_folder import STATE, RunFolder
from sparity.pipeline.run.runner import check_output, execute
from sparity.pipeline.run.tokens import tokenised_once
from sparity.pipeline.studies.executors import Executor, Lost, executor_of
from sparity.products.choice import settled
from sparity.sweep_file import Combination, Sweep
from sparity.visible import logger

log = logger(__name__)

# What is wrong with one combination. Anything else, a full disk above all, would be every later combination's end too.
OF_ONE = (InvalidInput, NumericalError, UnsupportedModel, torch.OutOfMemoryError, MemoryError)
LONGEST_VALUE = 200  # characters of a setting in the manifest; longer ones, texts in memory, are named by their hash


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its table, and the folder with `sweep.json`, `sweep.csv` and `sweep.html`."""

    report: SweepReport
    path: Path
    _keep_alive: Any = field(default=None, repr=False)  # the temporary folder, when no output was named


@wrong_input()
def sweep(
    sweep: str | Path | Mapping[str, Any],
    *,
    model: str | Path | nn.Module | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    on: str = "here",
) -> SweepResult:
    """Run a recipe over the cross product of axes and put what was measured into one table.

    Every combination is checked before the first one runs. One that fails all the same is a row with its message;
    the others go on.

    Args:
        sweep: a YAML file or a dictionary.
        model: a folder, a Hugging Face name or a model in memory (not changed), in place of the base recipe's.
        output: the folder of the table. Without one it lies in a temporary folder that lives as long as the result.
        device: "cpu", "cuda", ... or "auto".
        force: replace an existing output, or start an unfinished sweep over.
        resume: continue an unfinished sweep; finished combinations are not run again, failed ones are tried again.
        on: where the combinations run: "here", "pool:WORKERS", "ray", "ray:ADDRESS", "slurm" or "slurm:PARTITION". The
            results are the same; combinations whose speed is measured run one at a time, after the others.

    Raises:
        SparityError: bad input, a conflict with another run or a full disk; finished combinations stay.

    Example:
        >>> import sparity
        >>> base = {
        ...     "model": "zoo:llama",
        ...     "stages": [{"prune": {"score": "magnitude"}}],
        ...     "measure": {"perplexity": ["python-docs:held-out"], "window": 128, "windows": 2},
        ... }
        >>> result = sparity.sweep({"base": base, "vary": {"stages.0.prune.sparsity": [0.25, 0.5]}})
        >>> [(row.words, row.quality[0].change > 0) for row in result.report.rows]
        [('0.25', True), ('0.5', True)]
    """
    named, module = (None, model) if isinstance(model, nn.Module) else (model, None)
    checked = Sweep.read(sweep, model=None if named is None else str(named))
    return execute_sweep(
        checked, Silence(), module=module, output=output, device=device, force=force, resume=resume, on=on
    )


def execute_sweep(
    sweep: Sweep,
    progress: Progress,
    *,
    module: nn.Module | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    on: str = "here",
) -> SweepResult:
    """`sweep` for a checked sweep, with a progress that is told how it gets on."""
    executor = executor_of(on)
    if executor is not None and module is not None:
        raise InvalidInput(f"a model in memory cannot be swept on {on}: save it and name its folder, or run it here")
    path, temporary = output_folder(output, "sweep", resume)
    with tokenised_once():
        progress.phase(f"checking {len(sweep.combinations)} combinations")
        identity = _check(sweep, path, module, device)
        with RunFolder.working(path, identity, force, resume) as folder:
            if folder.finished:
                return SweepResult(SweepReport.read(path / "sweep.json"), path, temporary)
            if executor is not None:
                _work_elsewhere(sweep, executor, folder, progress, device)
            rows = []
            for number, combination in enumerate(sweep.combinations, 1):
                place = _Place(progress, f"{number} of {len(sweep.combinations)}, {combination.words}")
                kept = _kept(folder, number) if executor is not None else None
                rows.append(kept or _row(combination, number, folder, place, module, device))
                if executor is None:
                    _write_table(sweep, rows, folder)
            report = _write_table(sweep, rows, folder)
    return SweepResult(report, path, temporary)


def _write_table(sweep: Sweep, rows: Sequence[Row], folder: PassFolder) -> SweepReport:
    """The table of what is finished: whoever sees the folder can look at it."""
    report = SweepReport(plain(sweep.base.summary()), sweep.axes, tuple(rows), machine.describe())
    write_json(folder.path / "sweep.json", report.to_dict())
    write_text(folder.path / "sweep.csv", report.to_csv())
    write_text(folder.path / "sweep.html", render_sweep(report))
    return report


def _work_elsewhere(sweep: Sweep, executor: Executor, folder: RunFolder, progress: Progress, device: str) -> None:
    """Run what has no row yet on an executor; what measures speed last, and alone."""
    total, rows = len(sweep.combinations), {}
    for number in range(1, total + 1):
        row = _kept(folder, number)
        if row is not None and not row.failed:
            rows[number] = row
    left = [(number, each) for number, each in enumerate(sweep.combinations, 1) if number not in rows]
    together = [each for each in left if each[1].recipe.measure.speed is None]
    alone = [[each] for each in left if each[1].recipe.measure.speed is not None]
    for batch in ([together] if together else []) + alone:
        tasks = [
            partial(work_on, each, number, folder.path, device, folder.threads, folder.emulated_types)
            for number, each in batch
        ]
        progress.phase(f"{len(batch)} of {total} combinations run, {len(rows)} are finished")
        for ended in executor.run(tasks, folder.threads, folder.state / "jobs"):
            number, combination = batch[ended.index]
            if isinstance(ended.error, Lost):
                folder.remember(_name(number), _failed(combination, str(ended.error)).to_dict())
            elif ended.error is not None:
                raise ended.error
            rows[number] = _kept(folder, number) or _failed(combination, "its worker left no row")
            progress.phase(f"{len(rows)} of {total}, {combination.words}: {rows[number].message or 'finished'}")
            progress.block(len(rows), total, rows[number].seconds or 0.0)
            _write_table(sweep, [rows[each] for each in sorted(rows)], folder)


def work_on(
    combination: Combination, number: int, folder: Path, device: str, threads: int, emulated: Sequence[torch.dtype]
) -> None:
    """One combination of the sweep in a folder, for a process of its own: its row lies in the folder's state then."""
    torch.set_num_threads(threads)
    with settled(emulated):
        _row(combination, number, PassFolder(folder, folder / STATE), Silence(), None, device)


class _Place:
    """Says at which combination a run is that gets on."""

    def __init__(self, progress: Progress, words: str) -> None:
        self._progress, self._words = progress, words

    def phase(self, words: str) -> None:
        self._progress.phase(f"{self._words}: {words}")

    def block(self, done: int, total: int, seconds: float) -> None:
        self._progress.block(done, total, seconds)


def _check(sweep: Sweep, path: Path, module: nn.Module | None, device: str) -> dict[str, Any]:
    """Prepare every combination, so that what is wrong with one is known before the first runs.

    Returns:
        What makes two sweeps the same: base recipe, axes, and what the combinations read.
    """
    read: dict[str, list[Any]] = {}
    for combination in sweep.combinations:
        try:
            job = prepare(combination.recipe, module, device)
            check_output(job, path)
        except SparityError as error:
            raise type(error)(f'combination "{combination.words}": {error}') from error
        found = {key: value for key, value in job.identity().items() if key != "recipe"}
        found["texts"] = [token_hash(text.ids) for text in job.texts]
        for key, value in found.items():
            known = read.setdefault(key, [])
            if value not in known:
                known.append(value)
    vary = {
        axis: {label: {key: _short(value) for key, value in sets.items()} for label, sets in labels.items()}
        for axis, labels in sweep.settings.items()
    }
    identity = plain({"base": sweep.base.identity(), "vary": vary, "read": read})
    as_read_back: dict[str, Any] = json.loads(json.dumps(identity))
    return as_read_back


def _short(value: Any) -> str:
    text = json.dumps(plain(value), default=str, ensure_ascii=True)
    return text if len(text) <= LONGEST_VALUE else f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def _row(
    combination: Combination, number: int, folder: PassFolder, progress: Progress, module: nn.Module | None, device: str
) -> Row:
    """The row that an earlier process kept, or that of a run, kept before its weights are deleted."""
    row, run = _kept(folder, number), folder.state / f"run-{number}"
    if row is None or row.failed:
        row = _run(combination, run, progress, module, device)
        folder.remember(_name(number), row.to_dict())
    for left in (run, _partial(run)):
        if left.exists():
            _delete(left)
    return row


def _kept(folder: PassFolder, number: int) -> Row | None:
    """The row of a combination that some process kept."""
    kept = folder.recall(_name(number))
    return None if kept is None else Row.from_dict(kept, str(folder.state / f"{_name(number)}.json"))


def _name(number: int) -> str:
    return f"combination-{number}"


def _failed(combination: Combination, message: str) -> Row:
    recipe = plain(combination.recipe.summary())
    return Row(combination.labels, recipe, message, model=combination.recipe.model or "")


def _run(combination: Combination, run: Path, progress: Progress, module: nn.Module | None, device: str) -> Row:
    recipe, unfinished = plain(combination.recipe.summary()), _partial(run).exists() or run.exists()
    try:
        result = execute(
            combination.recipe, progress, model=module, output=run, device=device, force=True, resume=unfinished
        )
        return Row.of(combination.labels, recipe, result.report)
    except CorruptFile as error:
        if not unfinished:
            raise
        log.warning("%s: what a stopped run left is damaged, so it is run anew (%s)", combination.words, error)
        for left in (run, _partial(run)):
            if left.exists():
                _delete(left)
        return _run(combination, run, progress, module, device)
    except OF_ONE as error:
        said = str(error) if isinstance(error, SparityError) else f"out of memory: {error}"
        message = " ".join(said.split())
        progress.phase(f"failed: {message}")
        return _failed(combination, message)


def _partial(run: Path) -> Path:
    return run.with_name(f"{run.name}.partial")


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise SparityError(f"{folder} cannot be removed: {error.strerror or error}") from error
