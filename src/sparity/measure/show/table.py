"""The report in the terminal: the dense model first, then a row per candidate."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparity.measure.data.report import Candidate, Pace, Quality, Report
from sparity.measure.show import numbers, sentences
from sparity.measure.show.table_tasks import render_comparisons

WIDTH = 100
NAME_WIDTH, SPARSITY_WIDTH = 22, 9  # what one column gains the other loses
GRADES = {"excellent": "green", "good": "green", "acceptable": "yellow", "poor": "red"}
DIRECTIONS = {"faster": "green", "on par": "yellow", "slower": "red"}
ABSENT = Text("-", "dim")


def render_table(report: Report) -> Table:
    """A table that fits 80 columns; where several texts were measured, each has a row of its own under its model."""
    texts = sentences.gather_quality(report)
    title = f"{report.model}, perplexity on {next(iter(texts))[0]}" if len(texts) == 1 else report.model
    table = Table(title=Text(title, "bold"), title_justify="left", box=None, padding=(0, 1, 0, 0))
    changes = [_changes(report, candidate) for candidate in report.candidates]
    widest = max((len(line) for cell in changes for line in cell.splitlines()), default=0)
    table.add_column("model", overflow="fold", min_width=NAME_WIDTH - max(widest - SPARSITY_WIDTH, 0))
    for name in ("sparsity", "perplexity", "change", "KL", "top-1", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    dense = {key: _dense_quality([item for _, item in measured]) for key, measured in texts.items()}
    split = len(texts) > 1
    _add_rows(table, ("dense", numbers.percent(0)), dense, _dense_speed(report), split)
    ours = [item.speed.engine_dense.pace for item in report.candidates if item.speed and item.speed.engine_dense]
    if ours:
        _add_rows(table, ("dense, our kernels", ""), {}, _rates(ours), split)
    for candidate, cell in zip(report.candidates, changes, strict=True):
        measured = {(item.text, item.window): _quality(item) for item in candidate.quality}
        _add_rows(table, (candidate.name, cell), measured, _speed(candidate), split)
    return table


def print_report(report: Report, console: Console) -> None:
    """Print the table, then every note and every verdict."""
    width = min(console.width, WIDTH)
    console.print(render_table(report), width=width)
    console.print()
    console.print(Text(f"Weight files: {_sizes(report)}"), width=width)
    if any(candidate.speed and candidate.speed.engine_dense for candidate in report.candidates):
        console.print(Text(f'"ours": {sentences.SHARE}'), width=width)
    for whom, note in sentences.gather_notes(report):
        console.print(Text(f"Note{f' on {whom}' if whom else ''}: {note}"), width=width)
    for candidate in report.candidates:
        if candidate.tasks:
            console.print(render_comparisons(candidate.tasks), width=width)
        for verdict in candidate.verdicts:
            mark = Text("pass  ", "green") if verdict.passed else Text("MISSED", "bold red")
            said = f"  {candidate.name}: {verdict.limit}, reached {verdict.reached}"
            console.print(Text.assemble(mark, said), width=width)
    for said in sentences.describe_larger(report):
        console.print()
        console.print(Text(said), width=width)


def _add_rows(
    table: Table, start: tuple[str, str], quality: Mapping[tuple[str, int], tuple[Text, ...]], speed: Text, split: bool
) -> None:
    """One row; when `split`, the row of a model has no quality and a row follows for each text."""
    name, sparsity = start
    if not (split and quality):
        cells = next(iter(quality.values()), (ABSENT,) * 4)
        table.add_row(Text(name, "bold"), sparsity, *cells, speed)
        return
    table.add_row(Text(name, "bold"), sparsity, "", "", "", "", speed)
    for (text, _), cells in quality.items():
        table.add_row(Text(f"  {text}"), "", *cells, "")


def _changes(report: Report, candidate: Candidate) -> str:
    """The share of zeros; below it, where there are such changes, of parameters left and of channels skipped."""
    return numbers.shares(candidate.sparsity, report.left(candidate), candidate.totals.skipped)


def _quality(item: Quality) -> tuple[Text, ...]:
    change = Text(f"{numbers.change(item.change)}\n{item.grade}", GRADES.get(item.grade, ""))
    perplexity = Text(numbers.perplexity(item.perplexity))
    divergence, top1 = Text(numbers.divergence(item.kl)), Text(numbers.percent(item.top1))
    return perplexity, change, divergence, top1


def _dense_quality(items: list[Quality]) -> tuple[Text, ...]:
    perplexities = dict.fromkeys(numbers.perplexity(item.dense_perplexity) for item in items)
    return Text("\n".join(perplexities)), Text(""), Text(""), Text("")


def _sizes(report: Report) -> str:
    dense = dict.fromkeys(numbers.size(candidate.bytes_dense) for candidate in report.candidates)
    sparse = dict.fromkeys(numbers.size(candidate.bytes_sparse) for candidate in report.candidates)
    return f"dense {', '.join(dense)}; exported {', '.join(sparse)} ({report.dtype})."


def _dense_speed(report: Report) -> Text:
    """The dense median; it was timed anew beside each candidate, so several give the lowest and the highest."""
    return _rates([candidate.speed.dense for candidate in report.candidates if candidate.speed])


def _rates(paces: Sequence[Pace]) -> Text:
    medians = sorted(pace.decode.median for pace in paces)
    if not medians:
        return ABSENT
    return Text("-".join(dict.fromkeys((numbers.rate(medians[0]), numbers.rate(medians[-1])))))


def _speed(candidate: Candidate) -> Text:
    if candidate.speed is None:
        return ABSENT
    ratio = candidate.speed.decode_ratio
    words_of_ratio = Text(numbers.speed_ratio(ratio).replace(", ", "\n"), DIRECTIONS[numbers.direction(ratio)])
    said = Text.assemble(f"{numbers.rate(candidate.speed.sparse.decode.median)}\n", words_of_ratio)
    if candidate.speed.engine_dense:
        said.append(f"\n{numbers.ratio(candidate.speed.engine_dense.decode_ratio.median)} ours")
    return said
