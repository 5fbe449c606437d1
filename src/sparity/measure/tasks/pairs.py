"""The same tasks asked of several models in the same way, so that they can be compared item by item."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparity.measure.data.task_comparison import TaskComparison, compare_task
from sparity.measure.data.task_report import TaskResult
from sparity.measure.tasks.reading import has_policy
from sparity.measure.tasks.running import Settings, run_tasks


def settings_for(models: Sequence[Any], settings: Settings | None) -> Settings:
    """One way of reading for all: in steps where the cache of any has a policy."""
    settings = settings or Settings()
    if settings.way is None and any(has_policy(model) for model in models):
        return replace(settings, way="steps")
    return settings


def run_beside(
    model: Any, against: Any | None, tokenizer: Any, names: Sequence[str], settings: Settings | None = None
) -> tuple[tuple[TaskResult, ...], tuple[TaskComparison, ...]]:
    """What tasks say of a model, and beside another one; both read in the same way and with the same tokenizer.

    Raises:
        InvalidInput: see `run_tasks`.
    """
    models = [each for each in (against, model) if each is not None]
    settings = settings_for(models, settings)
    *first, mine = [run_tasks(each, tokenizer, tuple(names), settings) for each in models]
    pairs = zip(first[0], mine, strict=True) if first else ()
    return mine, tuple(compare_task(a, b) for a, b in pairs)
