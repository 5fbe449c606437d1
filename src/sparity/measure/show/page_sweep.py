"""A sweep as one self-contained page: the table, lines over a numeric axis, or a matrix of labels and texts."""

import itertools
import math
from collections.abc import Callable

from sparity.measure.charts.lines_matrix import Line, line_plot, matrix_chart
from sparity.measure.data.report import Quality
from sparity.measure.data.sweep_report import Row, SweepReport, quality_of
from sparity.measure.show import numbers, sentences
from sparity.measure.show.page import details, figure, page, table
from sparity.measure.show.page_run import GRADES
from sparity.visible import escape

Value = Callable[[Quality], float]


def render_sweep(report: SweepReport) -> str:
    """The whole page; write it to a file and open it, it needs nothing else."""
    name = sentences.join(list(dict.fromkeys(row.model for row in report.rows)))
    sections = [_summary(report, name), _table(report), _plots(report), _setting(report)]
    return page(f"{name}: sweep", sections, report.machine)


def describe_sweep(report: SweepReport) -> str:
    """How many combinations of what, and how many of them failed."""
    axes = [f"{head} ({len(axis.labels)})" for head, axis in zip(report.heads(), report.axes, strict=True)]
    said = f"{sentences.count(len(report.rows), 'combination')} of {sentences.join(axes)}"
    return f"{said}; {len(report.failed)} failed." if report.failed else f"{said}."


def _summary(report: SweepReport, name: str) -> str:
    parts = [
        '<header><p class="kicker">Sweep</p>',
        f"<h1>{escape(name)}</h1>",
        f'<p class="lead">{escape(describe_sweep(report))}</p></header>',
    ]
    for row in report.failed:
        parts.append(f'<p class="note"><b>{escape(row.words)} failed:</b> {escape(row.message or "")}</p>')
    return "".join(parts)


def _table(report: SweepReport) -> str:
    cut = any(row.parameters_left is not None for row in report.rows)
    skipping = any(row.skipped is not None for row in report.rows)
    heads = [*report.heads(), "realised sparsity", *["parameters left"] * cut, *["skipped at run time"] * skipping]
    before = len(heads) - len(report.axes)
    for text, window in report.texts:
        heads += [f"perplexity, {text}, windows of {window:,}", "KL, and same top-1"]
    timed = any(row.decode_ratio is not None for row in report.rows)
    judged = any(row.verdicts for row in report.rows)
    heads += ["decode speed"] * timed + ["limits"] * judged + ["time of the run", "peak memory"]
    rows = [_dense(report, before, len(heads))] if report.texts else []
    for row in report.rows:
        cells = [escape(label) for label in row.labels]
        if row.failed:
            cells += ['<span class="bad">failed</span>', *[""] * (len(heads) - len(cells) - 1)]
        else:
            cells.append(_or_empty(row.sparsity, numbers.percent))
            cells += [_or_empty(row.parameters_left, numbers.percent)] * cut
            cells += [_or_empty(row.skipped, numbers.percent)] * skipping
            cells += [cell for text in report.texts for cell in _quality(quality_of(row, text))]
            cells += [_or_empty(row.decode_ratio, numbers.ratio)] * timed
            cells += [_limits(row)] * judged
            cells += [_or_empty(row.seconds, numbers.seconds), _or_empty(row.peak_memory, numbers.size)]
        rows.append(cells)
    return f"<section><h2>Every combination</h2>{table(heads, rows, bool(report.texts), len(report.axes))}</section>"


def _dense(report: SweepReport, before: int, width: int) -> list[str]:
    """The dense model's row: `before` columns lie between the axes and the texts."""
    cells = ["dense", *[""] * (len(report.axes) - 1 + before)]
    for text in report.texts:
        values = dict.fromkeys(numbers.perplexity(item.dense_perplexity) for item in _measured(report, text))
        cells += [" / ".join(values), ""]
    return cells + [""] * (width - len(cells))


def _measured(report: SweepReport, text: tuple[str, int]) -> list[Quality]:
    return [item for row in report.rows if (item := quality_of(row, text))]


def _quality(item: Quality | None) -> list[str]:
    if item is None:
        return ["", ""]
    change = f'<small class="{GRADES.get(item.grade, "")}">{numbers.change(item.change)}</small>'
    return [
        f"{numbers.perplexity(item.perplexity)}{change}",
        f"{numbers.divergence(item.kl)}<small>{numbers.percent(item.top1)}</small>",
    ]


def _limits(row: Row) -> str:
    if not row.verdicts:
        return ""
    return '<span class="pass">✓ kept</span>' if row.accepted else '<span class="fail">✗ missed</span>'


def _or_empty(value: float | None, number: Callable[[float], str]) -> str:
    return "" if value is None else number(value)


def _plots(report: SweepReport) -> str:
    if not report.texts:
        return ""
    x = next((place for place, axis in enumerate(report.axes) if axis.numbers and len(axis.numbers) > 1), None)
    figures = _matrices(report) if x is None else [drawn for text in report.texts for drawn in _lines(report, x, text)]
    name = "Labels against texts" if x is None else f"Quality against {report.heads()[x]}"
    return f"<section><h2>{escape(name)}</h2>{''.join(figures)}</section>"


def _lines(report: SweepReport, x: int, text: tuple[str, int]) -> list[str]:
    """Perplexity and KL on one text over the axis in place `x`, a line per combination of the other axes."""
    values = dict(zip(report.axes[x].labels, report.axes[x].numbers or (), strict=True))
    others = [axis.labels for place, axis in enumerate(report.axes) if place != x]
    measured = {row.labels: quality_of(row, text) for row in report.rows}

    def lines(value: Value) -> list[Line]:
        found = []
        for rest in itertools.product(*others):
            points = {}
            for label, number in values.items():
                item = measured.get((*rest[:x], label, *rest[x:]))
                points[number] = math.nan if item is None else value(item)
            found.append(Line(", ".join(rest), points))
        return found

    head = report.heads()[x]
    dense = list(dict.fromkeys(item.dense_perplexity for item in measured.values() if item))
    level = ("dense", dense[0]) if len(dense) == 1 else None
    where = f"{text[0]}, windows of {text[1]:,} tokens"
    drawings = [
        (
            f"Perplexity on {where}",
            line_plot(
                f"Perplexity on {text[0]} against {head}",
                lines(lambda item: item.perplexity), head, "perplexity", numbers.perplexity, level,
            ),
        ),
        (
            f"KL to dense on {where}",
            line_plot(
                f"KL on {text[0]} against {head}",
                lines(lambda item: item.kl), head, "KL, nats per token", numbers.divergence,
            ),
        ),
    ]  # fmt: skip
    return [figure(caption, drawn) for caption, drawn in drawings]


def _matrices(report: SweepReport) -> list[str]:
    rows = [row.words for row in report.rows]
    names = [text for text, _ in report.texts]

    def cells(value: Value) -> dict[tuple[int, int], float]:
        return {
            (place, column): value(item)
            for place, row in enumerate(report.rows)
            for column, text in enumerate(report.texts)
            if (item := quality_of(row, text)) and not math.isnan(value(item))
        }

    change = matrix_chart("Change of perplexity", rows, names, cells(lambda item: item.change), numbers.change)
    kl = matrix_chart("KL to dense", rows, names, cells(lambda item: item.kl), numbers.divergence)
    frame = "the lowest of each text has a frame"
    return [
        figure(f"Change of perplexity relative to dense; {frame}", change),
        figure(f"KL to dense, nats per token; {frame}", kl),
    ]


def _setting(report: SweepReport) -> str:
    axes = "".join(f"<p><b>{escape(axis.name)}</b>: {escape(', '.join(axis.labels))}</p>" for axis in report.axes)
    recipe = details("Base recipe", f"<pre>{escape(numbers.recipe_yaml(report.base))}</pre>")
    return f"<section><h2>What was varied</h2>{axes}{recipe}</section>"
