"""A benchmark in the terminal: one row per contender and batch size."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparity.measure.data.bench_report import BenchReport, Ratio, Timing
from sparity.measure.show import numbers, sentences_bench
from sparity.measure.show.table import ABSENT, DIRECTIONS

WIDTH = 120
NARROW = 96  # columns; in fewer, memory is left to the lines below the table


def render_bench_table(report: BenchReport, narrow: bool = False) -> Table:
    """Medians with the lowest and the highest below them; the last column is the subject against each opponent."""
    weights = {runner.name: numbers.size(runner.weight_bytes) for runner in report.runners}
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("batch", justify="right")
    table.add_column("model", overflow="fold", min_width=12)
    memory = () if narrow else ("weights", "peak")
    for name in ("first token", "per token", "tokens/s", *memory, "this model"):
        table.add_column(name, justify="right", no_wrap=True)
    for batch in report.batches:
        for timing, ratio in report.at(batch):
            table.add_row(
                str(batch),
                Text(timing.name, "" if ratio else "bold"),
                *(
                    Text(numbers.spread(values, number).replace(" [", "\n["))
                    for values, number in (
                        (timing.pace.first_token, numbers.seconds),
                        (timing.token, numbers.seconds),
                        (timing.pace.decode, numbers.rate),
                    )
                ),
                *(() if narrow else (weights[timing.name], _peak(timing))),
                _ratio(ratio),
            )
    return table


def print_bench(report: BenchReport, console: Console) -> None:
    """Print how it was measured, the table, what was skipped, and what was found."""
    width = min(console.width, WIDTH)
    console.print(Text(sentences_bench.describe_protocol(report)), width=width)
    console.print(render_bench_table(report, narrow=width < NARROW), width=width)
    if width < NARROW:
        for runner in report.runners:
            console.print(Text(f"{runner.name}: weights {numbers.size(runner.weight_bytes)}"), width=width)
    console.print(Text(sentences_bench.MEMORY), width=width)
    for said in (*(f"Not run: {skip.reason}." for skip in report.skipped), *report.notes):
        console.print(Text(f"Note: {said}", "yellow"), width=width)
    for said in sentences_bench.describe_results(report):
        console.print(Text(said), width=width)


def _peak(timing: Timing) -> Text | str:
    return ABSENT if timing.peak_memory is None else numbers.size(timing.peak_memory)


def _ratio(ratio: Ratio | None) -> Text:
    if ratio is None:
        return ABSENT
    return Text(numbers.speed_ratio(ratio.decode).replace(", ", "\n"), DIRECTIONS[numbers.direction(ratio.decode)])
