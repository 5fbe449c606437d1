"""A search among shapes in the terminal: the front and the answer."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparity.measure.data.shape_report import ShapePoint, ShapeReport
from sparity.measure.show import numbers

MOST = 12  # shapes of the front that are shown


def print_shape(report: ShapeReport, console: Console) -> None:
    """Print what was asked, the front about the answer, and the answer in a sentence."""
    console.print(Text(f"{report.model}, {report.limits}", "bold"), soft_wrap=True)
    console.print(_front(report))
    console.print(
        f"{report.able:,} of {report.shapes:,} shapes keep the limits, {len(report.front):,} are not beaten by another",
        soft_wrap=True,
    )
    console.print(f"chosen: {describe_shape(report.answer, report.dense, report.prompt)}", soft_wrap=True)


def describe_shape(point: ShapePoint, dense: ShapePoint, prompt: int) -> str:
    """Sizes and predicted costs in a line."""
    sizes = ", ".join(f"{name} {size:,}" for name, size in point.sizes.items())
    said = [f"{sizes}: {numbers.size(point.bytes)}"]
    if point.token and dense.token and point.prompt and dense.prompt:
        said.append(f"decode {numbers.rate(1 / point.token)} tokens/s ({numbers.ratio(dense.token / point.token)})")
        said.append(
            f"prefill {numbers.rate(prompt / point.prompt)} tokens/s ({numbers.ratio(dense.prompt / point.prompt)})"
        )
    return f"{', '.join(said)}, importance {numbers.percent(-point.loss)}" if point.loss else ", ".join(said)


def _front(report: ShapeReport) -> Table:
    table, timed = Table(box=None, padding=(0, 1, 0, 0)), report.dense.token is not None
    speeds = ("decode", "prefill") if timed else ()
    for name in (*(axis.name for axis in report.axes), "importance", "bytes", *speeds, ""):
        table.add_column(name, justify="right")
    for point in _around(report):
        gains = (
            (numbers.ratio(before / after) if before and after else "")
            for before, after in ((report.dense.token, point.token), (report.dense.prompt, point.prompt))
        )
        table.add_row(
            *(f"{size:,}" for size in point.sizes.values()),
            numbers.percent(-point.loss),
            numbers.size(point.bytes),
            *(gains if timed else ()),
            "the answer" if point == report.answer else "",
        )
    return table


def _around(report: ShapeReport) -> tuple[ShapePoint, ...]:
    """As much of the front as is shown: every so many of its shapes, and the answer."""
    step = -(-len(report.front) // MOST)
    return tuple(point for place, point in enumerate(report.front) if not place % step or point == report.answer)
