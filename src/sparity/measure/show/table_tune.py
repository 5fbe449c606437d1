"""A search over weights, bits and inputs in the terminal: the front, and what was chosen by role."""

from collections import Counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparity.measure.data.tune_report import TuneReport
from sparity.measure.show import numbers
from sparity.measure.show.page_tune import GAINS, describe_tune


def print_tune(report: TuneReport, console: Console) -> None:
    """Print the answer, the front and how many units of each role got what."""
    console.print(Text(f"{report.model}, {report.goal} within {report.limits}", "bold"), soft_wrap=True)
    console.print(_front(report))
    if report.quality is not None:
        console.print(_chosen(report))
    console.print(Text(describe_tune(report)), soft_wrap=True)


def _front(report: TuneReport) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in (f"{GAINS[report.goal]}, predicted", "KL, summed", "KL, measured", "perplexity", ""):
        table.add_column(name, justify="right")
    for point in report.points:
        losses = (numbers.divergence(point.predicted), numbers.divergence(point.kl), numbers.change(point.change))
        table.add_row(f"{point.gain:.3f}", *losses, "the answer" if point.chosen else "")
    return table


def _chosen(report: TuneReport) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("role", "blocks", "choice", "format"):
        table.add_column(name, overflow="fold")
    counted = Counter((unit.role, unit.choice, unit.format) for unit in report.units)
    for (role, choice, form), count in counted.items():
        table.add_row(Text(role), str(count), Text(choice), Text(form))
    return table
