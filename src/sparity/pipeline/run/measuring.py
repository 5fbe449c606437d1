"""The measurements of a run, put together as a report."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparity.checkpoints.coded_sizes import coded_sizes
from sparity.checkpoints.packed import StoredMatrix
from sparity.checkpoints.packed_file import encoding_of
from sparity.checkpoints.source import CheckpointSource
from sparity.checkpoints.weight_files import weight_bytes
from sparity.engine.decoding import model as decoding
from sparity.engine.kernels.native_weight import declines
from sparity.formats import build_encoding
from sparity.measure.data import machine
from sparity.measure.data.outcome import Totals
from sparity.measure.data.report import Candidate, Curve, Effort, Quality, Report, Speed, Verdict
from sparity.measure.data.task_comparison import TaskComparison
from sparity.measure.show.sentences import describe_coding, describe_products
from sparity.measure.timing.speed import compare_speed, engine_declines
from sparity.models.loading import load, load_tokenizer
from sparity.pipeline.run.finished_pass import Done
from sparity.pipeline.run.format_choices import dense_words
from sparity.pipeline.run.job import Job
from sparity.pipeline.run.measured_tasks import ask_tasks, judge_tasks
from sparity.pipeline.run.tokens import MeasuredText
from sparity.processes.group import ALONE, Group
from sparity.quality.agreement import compare, grade
from sparity.recipe import Accept, Output
from sparity.stages import Change


@dataclass(frozen=True)
class Measured:
    """How two models compare, and the two, loaded; nothing where nothing is measured."""

    quality: tuple[Quality, ...] = ()
    dense: Any = field(default=None, repr=False)
    sparse: Any = field(default=None, repr=False)


PLAIN_NOTE = (
    "This is a plain export: zeros are stored and computed like any other number, so they make it neither smaller nor "
    "faster than the dense model."
)


def measure_quality(job: Job, folder: Path, group: Group = ALONE) -> Measured:
    """Load the dense model and the one in `folder`, and compare them on the recipe's texts, which ranks share out.

    The models stay loaded, for `measure`, on rank 0.
    """
    if not job.texts and not (group.first and (job.recipe.measure.speed or job.recipe.measure.tasks)):
        return Measured()
    dense, sparse = job.dense_model(), load(folder, device=job.measured_on, dtype=job.decoder.dtype)
    quality = tuple(quality_on(text, dense, sparse, group) for text in job.texts)
    return Measured(quality, dense, sparse) if group.first else Measured(quality)


def measure(
    job: Job, folder: Path, done: Done, changes: tuple[Change, ...], effort: Effort, measured: Measured
) -> Report:
    """Measure the speed of both models, and judge the result in `folder`."""
    totals = Totals.of(changes)
    quality, dense, sparse = measured.quality, measured.dense, measured.sparse
    speeds: tuple[Speed, ...] = ()
    notes = [*_notes(job, folder, totals), *(note for training in done.trainings for note in training["notes"])]
    compared: tuple[TaskComparison, ...] = ()
    if dense is not None:
        speeds = tuple(_speeds(job, dense, sparse))
        if job.recipe.measure.tasks:
            tokenizer = load_tokenizer(job.folder or folder)
            compared, asked = ask_tasks(job.recipe.measure.tasks, dense, sparse, tokenizer)
            notes += asked
        if speeds and job.recipe.output.format == "packed" and (reason := engine_declines(dense)):
            notes.append(f"The dense model was timed in transformers only, not on our own dense kernels: {reason}.")
        if speeds and decoding.has_fast_path(sparse) and (reason := decoding.declines(sparse)):
            notes.append(f"The sparse model decodes by its own code, not on the engine's fast path: {reason}.")
    speed = speeds[0] if speeds else None
    parameters = _parameters(job.decoder.source.shapes().values())
    left = _parameters(CheckpointSource(folder).shapes().values())
    candidate = Candidate(
        name=f"{job.words}{_output_words(job.recipe.output)}",
        recipe=job.recipe.summary(),
        stages=tuple(planned.stage.words for planned in job.stages),
        target=totals.target,
        sparsity=totals.zeros or 0.0,
        model_sparsity=sum(each.zeros * each.size for each in totals.outcomes) / left if left else 0.0,
        parameters=left,
        bytes_dense=_dense_bytes(job),
        bytes_sparse=weight_bytes(folder),
        changes=changes,
        effort=effort,
        quality=quality,
        speed=speed,
        verdicts=(
            *judge(job.recipe.accept, quality, speed),
            *judge_tasks(job.recipe.accept.tasks, compared),
        ),
        tasks=compared,
        notes=tuple(notes),
        batched=speeds[1:],
        runtime=tuple(entry["name"] for entry in done.runtime),
        curves=tuple(_curves(done)),
    )
    return Report(
        model=job.name,
        architecture=type(job.decoder.skeleton).__name__,
        parameters=parameters,
        blocks=len(job.decoder),
        dtype=str(job.decoder.dtype).removeprefix("torch."),
        machine=machine.describe(),
        candidates=(candidate,),
    )


def _curves(done: Done) -> Iterator[Curve]:
    for training in done.trainings:
        for name, points in training["curves"].items():
            steps, values = zip(*points, strict=True) if points else ((), ())
            yield Curve(training["stage"], name, tuple(steps), tuple(values))


def _parameters(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _packed_note(folder: Path) -> str:
    """What is packed how, and what multiplies it."""
    source = CheckpointSource(folder)
    stored = Counter(_stored_words(matrix.entry) for matrix in source.matrices.values())
    held = ", ".join(f"{count} matrices as {name}" for name, count in stored.items())
    reasons = {reason for matrix in _one_of_each(source) if (reason := declines(matrix.packed()))}
    run = "multiplied by compiled kernels"
    if reasons:
        run = f"unpacked for every product, which is slow ({'; '.join(sorted(reasons))})"
    reason = dense_words(folder)
    what = (
        f"{held}, {run}"
        if held
        else "all matrices are dense"
        if reason
        else "no matrix would be smaller, so all are dense"
    )
    what = "; ".join(filter(None, (what, reason, describe_coding(coded_sizes(source)))))
    return f"This is a packed export: {what}. Loading it needs `import sparity`."


def _output_words(output: Output) -> str:
    if output.format != "packed":
        return ""
    said = [output.values, *(each.values for each in output.matrices.values() if each.values is not None)]
    names = dict.fromkeys(found.name for found in map(build_encoding, said) if not found.exact)
    coding = ", Huffman-coded" if output.coding == "huffman" else ""
    return f", packed in {' and '.join(names)}{coding}" if names else f", packed{coding}"


def _stored_words(entry: Mapping[str, Any]) -> str:
    encoding = encoding_of(entry)
    return str(entry["format"]) if encoding.exact else f"{entry['format']}, {encoding.name}"


def _one_of_each(source: CheckpointSource) -> list[StoredMatrix]:
    return list({_stored_words(matrix.entry): matrix for matrix in source.matrices.values()}.values())


def _notes(job: Job, folder: Path, totals: Totals) -> Iterator[str]:
    if job.recipe.output.format == "packed":
        yield _packed_note(folder)
    elif totals.has_zeros:
        yield PLAIN_NOTE
    dtypes = {dtype for dtype in job.decoder.source.dtypes().values() if dtype.is_floating_point}
    if dtypes != {job.decoder.dtype}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        exported = str(job.decoder.dtype).removeprefix("torch.")
        yield f"The model was stored as {names} and exported as {exported}: only that changes the size."
    if torch.device(job.device).type == "cpu" and (products := describe_products(job.decoder.dtype)):
        yield products


def judge(accept: Accept, quality: tuple[Quality, ...], speed: Speed | None) -> list[Verdict]:
    """One verdict per limit of the recipe; what was not measured cannot be accepted."""
    verdicts = []
    if accept.perplexity is not None:
        limit = float(re.sub(r"[+%]", "", accept.perplexity)) / 100
        worst = _worst([q.change for q in quality])
        reached = "not measured" if worst is None else f"{worst:+.2%}"
        passed = worst is not None and worst <= limit
        verdicts.append(Verdict(f"perplexity at most {accept.perplexity}", reached, passed))
    if accept.kl is not None:
        worst = _worst([q.kl for q in quality])
        reached = "not measured" if worst is None else f"{worst:.4f}"
        verdicts.append(Verdict(f"KL at most {accept.kl:g}", reached, worst is not None and worst <= accept.kl))
    if accept.decode is not None:
        ratio = None if speed is None else speed.decode_ratio.median
        reached = "not measured" if ratio is None else f"{ratio:.2f}x"
        passed = ratio is not None and ratio >= float(accept.decode.rstrip("x"))
        verdicts.append(Verdict(f"decode at least {accept.decode}", reached, passed))
    return verdicts


def _worst(values: list[float]) -> float | None:
    """The largest value; NaN, which no limit accepts, outranks all. None when there are none."""
    return max(values, key=lambda value: (math.isnan(value), value), default=None)


def quality_on(text: MeasuredText, dense: Any, other: Any, group: Group = ALONE) -> Quality:
    """How a model does on a text beside the dense one; ranks share the text out."""
    found = compare(dense, other, text.ids, text.window, group)
    change = found.perplexity / found.dense_perplexity - 1
    return Quality(
        text=text.name,
        window=text.window,
        tokens=found.tokens,
        dense_perplexity=found.dense_perplexity,
        perplexity=found.perplexity,
        change=change,
        grade=grade(change),
        kl=found.kl,
        top1=found.top1,
    )


def _speeds(job: Job, dense: Any, sparse: Any) -> Iterator[Speed]:
    test = job.recipe.measure.speed
    if test is None:
        return
    for batch in test.batch:
        yield compare_speed(dense, sparse, _prompt(job), test.prompt, test.tokens, test.rounds, batch)


def _prompt(job: Job) -> Tensor:
    """Ids to generate from: a measured text, calibration tokens, or simply the first ids of the vocabulary."""
    wanted = job.recipe.measure.speed.prompt if job.recipe.measure.speed else 0
    candidates = [text.ids for text in job.texts] + ([] if job.tokens is None else [job.tokens.flatten()])
    return next((ids for ids in candidates if len(ids) >= wanted), torch.arange(wanted) % job.decoder.config.vocab_size)


def _dense_bytes(job: Job) -> int:
    if job.folder is not None:
        return weight_bytes(job.folder)
    shapes = job.decoder.source.shapes()
    return sum(torch.Size(shapes[name]).numel() * dtype.itemsize for name, dtype in job.decoder.source.dtypes().items())
