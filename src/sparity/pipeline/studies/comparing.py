"""Models beside each other: quality, tasks, speed and memory, each measured in the same way for all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from sparity.checkpoints.packed import runtime_of
from sparity.checkpoints.source import CheckpointSource
from sparity.checkpoints.weight_files import is_read_packed, weight_bytes
from sparity.errors import InvalidInput
from sparity.measure.data import machine
from sparity.measure.data.comparison_report import Compared, ComparisonReport
from sparity.measure.data.task_comparison import compare_task
from sparity.measure.data.task_report import TaskResult
from sparity.measure.show.sentences_tasks import setting_words
from sparity.measure.tasks.reading import has_policy
from sparity.measure.tasks.running import Settings, run_tasks
from sparity.measure.timing.bench import Protocol, bench
from sparity.measure.timing.contenders import Contender
from sparity.models import transformers as hf
from sparity.models.loading import load, load_tokenizer
from sparity.pipeline.run.measuring import quality_on
from sparity.pipeline.run.tokens import MeasuredText

Texts = Callable[[Any, Any], Sequence[MeasuredText]]  # the first model and its tokenizer -> what is measured on


@dataclass(frozen=True)
class Asked:
    """What is compared.

    Attributes:
        tasks: their names.
        settings: how they are asked.
        speed: what is generated; None = speed and memory are not measured.
        dtype: in which quality and tasks are measured; speed is measured in bfloat16.
    """

    tasks: tuple[str, ...] = ()
    settings: Settings | None = None
    speed: Protocol | None = None
    dtype: str = "auto"


def compare_models(
    names: Sequence[str], texts: Texts, asked: Asked, phase: Callable[[str], None] = lambda words: None
) -> ComparisonReport:
    """Measure models beside the first of them.

    Args:
        names: folders or names, at least two; the first is what the others are compared with.
        texts: gives the texts for the first model and its tokenizer.
        asked: what else is measured.
        phase: told what begins.

    Raises:
        InvalidInput: fewer than two models, one twice, another vocabulary, or no tokenizer for tasks.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise InvalidInput(f"compare: name at least two different models (got {', '.join(names) or 'none'})")
    folders = [hf.locate(name) for name in names]
    phase(f"loading {names[0]}")
    tokenizer, first = load_tokenizer(folders[0]), load(folders[0], dtype=asked.dtype)
    measured = texts(first, tokenizer)
    models: list[Compared] = []
    policies = False
    for name, folder in zip(names, folders, strict=True):
        phase(f"measuring {name}")
        model = first if not models else load(folder, dtype=asked.dtype)
        _check_vocabulary(names[0], first, name, model)
        policies = policies or has_policy(model)
        quality = tuple(quality_on(text, first, model) for text in measured)
        models.append(replace(_described(name, folder), quality=quality))
        del model
    settings = asked.settings or Settings()
    if policies and settings.way is None:  # all read in one way
        settings = replace(settings, way="steps")
    results: list[tuple[TaskResult, ...]] = []
    for place, (name, folder) in enumerate(zip(names, folders, strict=True) if asked.tasks else ()):
        phase(f"asking {name}")
        model = first if not results else load(folder, dtype=asked.dtype)
        results.append(run_tasks(model, tokenizer, asked.tasks, settings))
        pairs = zip(results[0], results[-1], strict=True) if place else ()
        differences = tuple(compare_task(a, b) for a, b in pairs)
        models[place] = replace(models[place], tasks=results[-1], differences=differences)
        del model
    ids = measured[0].ids if measured else torch.arange(first.config.vocab_size)
    del first
    speed = None
    if asked.speed is not None:
        every = [Contender(name, folder, "engine") for name, folder in zip(names, folders, strict=True)]
        speed = bench([*every[1:], every[0]], ids, asked.speed, phase)  # the first is the subject of all ratios
    notes = tuple(dict.fromkeys(setting_words(task) for found in results for task in found))
    return ComparisonReport(tuple(models), speed, notes, machine.describe())


def _check_vocabulary(first_name: str, first: Any, name: str, model: Any) -> None:
    sizes = [each.config.get_text_config().vocab_size for each in (first, model)]
    if sizes[0] != sizes[1]:
        raise InvalidInput(
            f"compare: {first_name} has {sizes[0]:,} tokens in its vocabulary and {name} {sizes[1]:,}: perplexities of "
            "different tokenizers cannot be compared"
        )


def _described(name: str, folder: Path) -> Compared:
    source = CheckpointSource(folder)
    shapes = source.shapes()
    zeros = 0
    for key in shapes:  # one tensor in memory at a time
        (tensor,) = source.read([key]).values()
        zeros += int((tensor == 0).sum()) if tensor.is_floating_point() else 0
    parameters = sum(prod(shape) for shape in shapes.values())
    stages = tuple(entry.name for entry in runtime_of(folder))
    packed = ("packed",) if is_read_packed(folder) else ()
    share = zeros / parameters if parameters else 0.0
    return Compared(name, parameters, weight_bytes(folder), share, (*packed, *stages))
