"""Tasks asked of one model through lm-evaluation-harness, with what it said to every item."""

import logging
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from sparity.errors import InvalidInput
from sparity.measure.data.task_report import TaskResult, TaskScore
from sparity.measure.tasks.names import FILES, HUB, OWN, Way, checked_tasks, source_of

SEED = 1234  # of the draw of examples, the harness's own
INSTALL = "task suites need lm-evaluation-harness: pip install 'lm-eval>=0.4.13,<0.5' (the extra `eval`)"


@dataclass(frozen=True)
class Settings:
    """How tasks are asked.

    Attributes:
        data: the folder of local task files; None = the variable SPARITY_DATA.
        fewshot: examples before each question; None = what each task says, else 0.
        limit: only the first so many items of each task.
        batch: questions per pass.
        context: tokens of the long texts that are made.
        items: how many of them.
        seed: of them.
        way: how models read; None = in steps where a model's cache has a policy.
    """

    data: str | None = None
    fewshot: int | None = None
    limit: int | None = None
    batch: int = 1
    context: int = 512
    items: int = 100
    seed: int = 0
    way: Way | None = None


def missing() -> str | None:
    """What is to be installed, or None."""
    return None if find_spec("lm_eval") else INSTALL


def run_tasks(
    model: Any, tokenizer: Any, names: str | list[str] | tuple[str, ...], settings: Settings | None = None
) -> tuple[TaskResult, ...]:
    """Ask a model the tasks.

    Args:
        model: a Hugging Face causal language model, with whatever runs with it.
        tokenizer: its tokenizer; it must know where it was loaded from.
        names: local tasks, or `hub:NAME` for one that the harness downloads.
        settings: see `Settings`.

    Raises:
        InvalidInput: no such task, its file is not there, the harness is not installed, or it refused.
    """
    wanted, settings = checked_tasks(names), settings or Settings()
    if reason := missing():
        raise InvalidInput(reason)
    if tokenizer is None:
        raise InvalidInput("the model has no tokenizer, and tasks are texts")
    from sparity.measure.tasks.harness_model import SparityLM

    with _quiet():
        loaded = _load(wanted, tokenizer, settings)
        found: list[TaskResult] = []
        for name in wanted:  # one by one, so that what was cut is counted by task
            tasks, groups = loaded[name]
            subject = SparityLM(model=model, tokenizer=tokenizer, batch_size=settings.batch, way=settings.way)
            found += _asked(name, {"tasks": tasks, "groups": groups}, subject, settings)
    return tuple(found)


def _load(names: tuple[str, ...], tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """The harness's objects of each name."""
    from lm_eval.tasks import TaskManager

    about = {"context": settings.context, "items": settings.items, "seed": settings.seed, "data": settings.data}
    official = any(name.startswith(HUB) for name in names)
    manager = TaskManager(
        include_path=str(FILES), include_defaults=official, metadata={**about, "tokenizer": str(tokenizer.name_or_path)}
    )
    found = {}
    for name in names:
        try:
            loaded = manager.load([name.removeprefix(HUB) if name.startswith(HUB) else f"{OWN}{name}"])
        except KeyError as error:
            raise InvalidInput(f"the harness knows no task {name.removeprefix(HUB)!r}") from error
        except (OSError, ImportError) as error:
            raise InvalidInput(f"the data of {name} cannot be had: {error}") from error
        for task in loaded["tasks"].values():
            _examples(task, settings.fewshot)
        found[name] = loaded["tasks"], loaded.get("groups", {})
    return found


def _examples(task: Any, wanted: int | None) -> None:
    """Set how many examples stand before a question; a task that says 0 keeps it, as in the harness."""
    own = task.get_config("num_fewshot")
    if own is None or (wanted is not None and own != 0):
        task.set_config(key="num_fewshot", value=wanted or 0)
    task.set_fewshot_seed(seed=SEED)


def _asked(name: str, tasks: Any, subject: Any, settings: Settings) -> Iterator[TaskResult]:
    from lm_eval.evaluator import evaluate

    if settings.limit is not None and settings.limit < 1:
        raise InvalidInput(f"limit {settings.limit}: at least one item is asked")
    out = evaluate(lm=subject, task_dict=tasks, limit=settings.limit, bootstrap_iters=0, log_samples=True)
    for own, samples in out["samples"].items():
        task = tasks["tasks"][own]
        values = {key: value for key, value in out["results"][own].items() if isinstance(value, int | float)}
        yield TaskResult(
            name=own.removeprefix(OWN),
            source=source_of(name),
            version=str(out["versions"][own]),
            fewshot=int(task.get_config("num_fewshot") or 0),
            way=subject.way,
            cut=subject.reader.cut,
            hashes=tuple(sample["doc_hash"][:16] for sample in _first_filter(samples)),
            scores=tuple(_scores(task, samples, values)),
        )


def _first_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = samples[0]["filter"]
    return sorted((sample for sample in samples if sample["filter"] == first), key=lambda sample: sample["doc_id"])


def _scores(task: Any, samples: list[dict[str, Any]], values: dict[str, float]) -> Iterator[TaskScore]:
    """The metrics of a task with their items, in the task's order."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    means = {entry["metric"]: entry.get("aggregation", "mean") for entry in task.config.metric_list}
    for metric, kind in means.items():
        for each in filters:
            mine = sorted((sample for sample in samples if sample["filter"] == each), key=lambda one: one["doc_id"])
            if metric not in mine[0]:
                continue
            raw = [sample[metric] for sample in mine]
            items = tuple(float(value[0] if isinstance(value, tuple | list) else value) for value in raw)
            name = metric if len(filters) == 1 else f"{metric},{each}"
            error = statistics.stdev(items) / math.sqrt(len(items)) if kind == "mean" and len(items) > 1 else None
            yield TaskScore(name, float(values[f"{metric},{each}"]), error, items, str(kind))


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's notes about defaults are not shown, nor its progress bars."""
    from lm_eval.api import task as task_module

    bars, before = task_module.tqdm, logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    task_module.tqdm = partial(bars, disable=True)
    try:
        yield
    finally:
        task_module.tqdm = bars
        logging.disable(before)
