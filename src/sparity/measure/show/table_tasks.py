"""Tasks in the terminal: one row per task and metric, beside a first model where there is one."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparity.measure.data.task_comparison import TaskComparison
from sparity.measure.data.task_report import TaskResult
from sparity.measure.show.sentences_tasks import (
    PAIRED,
    change_words,
    score_words,
    setting_words,
    verdict_words,
)

WIDTH = 120


def render_tasks(results: Sequence[TaskResult]) -> Table:
    """Every metric of every task."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    table.add_column("items", justify="right")
    table.add_column("value", justify="right", no_wrap=True)
    for result in results:
        for place, score in enumerate(result.scores):
            name = result.label if place == 0 else ""
            table.add_row(Text(name), score.metric, f"{len(score.items):,}", score_words(score))
    return table


def render_comparisons(found: Sequence[TaskComparison]) -> Table:
    """The main metric of every task, of two models."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold", min_width=8)
    for name in ("against", "model", "change", "lost/won", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        share = one.drop is not None
        values = [f"{value * 100:.1f} %" if share else f"{value:.3f}" for value in (one.first, one.second)]
        pairs = [f"{one.lost}/{one.won}", f"{one.p:.3f}"] if share else ["", ""]
        table.add_row(one.name, *values, Text(change_words(one)), *pairs)
    return table


def print_tasks(results: Sequence[TaskResult], found: Sequence[TaskComparison], console: Console) -> None:
    """The tables, what each difference is worth, and how each task was asked."""
    width = min(console.width, WIDTH)
    console.print(render_tasks(results), width=width)
    if found:
        console.print()
        console.print(render_comparisons(found), width=width)
        for one in found:
            console.print(Text(f"{one.name}: {verdict_words(one)}."), width=width)
        console.print(Text(PAIRED), width=width)
    console.print()
    for result in results:
        console.print(Text(setting_words(result)), width=width)
