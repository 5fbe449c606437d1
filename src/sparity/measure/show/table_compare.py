"""Several models in the terminal: a row each, then the tasks of each beside the first."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparity.measure.charts.tradeoff import dominated
from sparity.measure.data.comparison_report import ComparisonReport
from sparity.measure.show import numbers
from sparity.measure.show.sentences_tasks import PAIRED
from sparity.measure.show.table import ABSENT, DIRECTIONS
from sparity.measure.show.table_tasks import WIDTH, render_comparisons, render_tasks


def render_comparison_table(report: ComparisonReport) -> Table:
    """What all models have: zeros, files, perplexity and KL on the first text, speed."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold", min_width=12)
    for name in ("zeros", "files", "perplexity", "KL", "top-1", "tokens/s", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for model in report.models:
        item = model.quality[0] if model.quality else None
        rate, ratio = report.decode(model.name), report.faster(model.name)
        table.add_row(
            Text(model.name, "bold" if model is report.first else ""),
            numbers.percent(model.zeros),
            numbers.size(model.file_bytes),
            ABSENT if item is None else numbers.perplexity(item.perplexity),
            ABSENT if item is None else numbers.divergence(item.kl),
            ABSENT if item is None else numbers.percent(item.top1),
            ABSENT if rate is None else numbers.rate(rate.median),
            ABSENT if ratio is None else Text(numbers.speed_ratio(ratio), DIRECTIONS[numbers.direction(ratio)]),
        )
    return table


def print_comparison(report: ComparisonReport, console: Console) -> None:
    """The table, the models that are beaten in both, and the tasks."""
    width = min(console.width, WIDTH)
    console.print(render_comparison_table(report), width=width)
    for name, winner in dominated(report.contestants()).items():
        console.print(Text(f"{name} is beaten in speed and perplexity by {winner}."), width=width)
    if report.first.tasks:
        console.print()
        console.print(Text(report.first.name, "bold"), width=width)
        console.print(render_tasks(report.first.tasks), width=width)
    for model in report.models[1:]:
        if model.differences:
            console.print()
            console.print(Text(f"{model.name} against {report.first.name}", "bold"), width=width)
            console.print(render_comparisons(model.differences), width=width)
    if report.first.tasks:
        console.print(Text(PAIRED), width=width)
    for note in report.notes:
        console.print(Text(note), width=width)
