"""A sweep in the terminal: one row per combination."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparity.measure.data.sweep_report import Row, SweepReport, quality_of
from sparity.measure.show import numbers
from sparity.measure.show.page_sweep import describe_sweep
from sparity.measure.show.table import ABSENT, GRADES

LABEL = 12  # columns that a label has without being folded


def render_sweep_table(report: SweepReport) -> Table:
    """Axes, what was done, then what was measured: all of it on one text, perplexity and its change on several."""
    texts = report.texts
    table = Table(box=None, padding=(0, 1, 0, 0))
    for head, axis in zip(report.heads(), report.axes, strict=True):
        table.add_column(Text(head), overflow="fold", min_width=min(max(map(len, (head, *axis.labels))), LABEL))
    names = ["realised", *(["perplexity", "change", "KL", "top-1"] if len(texts) == 1 else [])]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    if len(texts) > 1:
        for text, _ in texts:
            table.add_column(Text(text), justify="right", overflow="fold", min_width=8)
    table.add_column("time", justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(*(Text(label) for label in row.labels), *_cells(row, report))
    return table


def print_sweep(report: SweepReport, console: Console) -> None:
    """Print what was varied, the table, the dense model's perplexities, and every message of a failure."""
    console.print(Text(describe_sweep(report), "bold"), soft_wrap=True)
    console.print(render_sweep_table(report))
    dense: dict[tuple[str, int], dict[str, None]] = {}
    for row in report.rows:
        for item in row.quality:
            dense.setdefault((item.text, item.window), {})[numbers.perplexity(item.dense_perplexity)] = None
    if dense:
        said = ", ".join(f"{' / '.join(values)} on {text}" for (text, _), values in dense.items())
        console.print(Text(f"\nThe dense model has a perplexity of {said}."), soft_wrap=True)
    for row in report.failed:
        console.print(Text.assemble(("failed ", "bold red"), f" {row.words}: {row.message}"), soft_wrap=True)


def _cells(row: Row, report: SweepReport) -> list[Text]:
    texts = report.texts
    if row.failed or row.sparsity is None:
        return [Text("failed", "bold red"), *[ABSENT] * (4 if len(texts) == 1 else len(texts)), ABSENT]
    cells = [Text(numbers.shares(row.sparsity, row.parameters_left, row.skipped))]
    for text in texts:
        item = quality_of(row, text)
        if item is None:
            cells += [ABSENT] * (4 if len(texts) == 1 else 1)
            continue
        perplexity = Text(numbers.perplexity(item.perplexity))
        change = Text(numbers.change(item.change), GRADES.get(item.grade, ""))
        if len(texts) == 1:
            cells += [perplexity, change, Text(numbers.divergence(item.kl)), Text(numbers.percent(item.top1))]
        else:
            cells.append(Text.assemble(perplexity, "\n", change))
    return [*cells, ABSENT if row.seconds is None else Text(numbers.seconds(row.seconds))]
