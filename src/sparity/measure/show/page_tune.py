"""A search over weights, bits and inputs as one self-contained page: the answer, the front, every choice."""

from sparity.measure.charts.bars_and_maps import heat_map
from sparity.measure.charts.lines_matrix import Line, line_plot
from sparity.measure.data.tune_report import TuneReport
from sparity.measure.show import numbers, sentences
from sparity.measure.show.page import details, figure, page, table
from sparity.visible import escape

GAINS = {"tokens/s": "times as fast", "prefill": "times as fast", "bytes": "times as small"}


def render_tune(report: TuneReport) -> str:
    """The whole page; write it to a file and open it, it needs nothing else."""
    sections = [_summary(report), _front(report), _units(report), _options(report), _setting(report)]
    return page(f"{report.model}: {report.goal} within {report.limits}", sections, report.machine)


def describe_tune(report: TuneReport) -> str:
    """The answer in a sentence or two."""
    if report.quality is None:
        return report.verdict or "Nothing was chosen."
    gain = "" if report.gain is None else f", {report.gain:.2f} {GAINS[report.goal]} as dense"
    found = report.quality
    return (
        f"Perplexity {numbers.perplexity(found.dense_perplexity)} becomes {numbers.perplexity(found.perplexity)} "
        f"({numbers.change(found.change)}), KL {numbers.divergence(found.kl)}{gain}."
    )


def _summary(report: TuneReport) -> str:
    lead = escape(describe_tune(report))
    note = "" if report.verdict is None else f'<p class="note"><b>Not met:</b> {escape(report.verdict)}</p>'
    measured = "every unit alone" if report.how == "each" else "roles and blocks"
    said = (
        f"{sentences.count(len(report.units), 'unit')}, {sentences.count(len(report.choices), 'choice')}, measured: "
        f"{measured}, on {report.calibration_tokens:,} predictions of the calibration text; whole models on "
        f"{report.tokens:,} of {report.text}. {numbers.seconds(report.seconds)} in all."
    )
    return (
        f'<header><p class="kicker">{escape(report.goal)} within {escape(report.limits)}</p>'
        f'<h1>{escape(report.model)}</h1><p class="lead">{lead}</p>{note}<p>{escape(said)}</p></header>'
    )


def _front(report: TuneReport) -> str:
    name = f"{GAINS[report.goal]} as dense, predicted"
    lines = [
        Line("measured", {point.gain: point.kl for point in report.points}),
        Line("sum of single units", {point.gain: point.predicted for point in report.points}),
    ]
    drawing = line_plot("The front", lines, name, "KL, nats per token", numbers.divergence)
    rows = [
        [
            f"{point.gain:.3f}x{' (the answer)' if point.chosen else ''}",
            numbers.divergence(point.predicted),
            numbers.divergence(point.kl),
            f"{point.kl / point.predicted:.2f}" if point.predicted > 0 else "",
            numbers.change(point.change),
        ]
        for point in report.points
    ]
    heads = ["predicted gain", "KL, sum of single units", "KL, measured", "ratio", "perplexity"]
    shown = figure("KL to the dense model against what is gained, for the cheapest choices of everything", drawing)
    pairs = ""
    if report.pairs:
        found = [[escape(pair.first), escape(pair.second), f"{pair.cosine:+.2f}"] for pair in report.pairs]
        pairs = details("Pairs whose errors were measured together", table(["one", "other", "cosine"], found))
    return f"<section><h2>The front</h2>{shown}{table(heads, rows)}{pairs}</section>"


def _units(report: TuneReport) -> str:
    blocks = 1 + max(unit.block for unit in report.units)
    cells = {(unit.block, unit.role): unit.loss for unit in report.units}
    drawing = heat_map("KL alone", cells, blocks, (0.0, max(cells.values(), default=0.0)), numbers.divergence)
    rows = [
        [
            escape(unit.name),
            escape(unit.choice),
            escape(unit.format),
            numbers.divergence(unit.loss),
            numbers.percent(unit.cost / unit.dense) if unit.dense else "",
        ]
        for unit in report.units
    ]
    heads = ["unit", "choice", "format", "KL alone", "cost, of dense"]
    shown = figure("KL that each unit's choice loses alone", drawing)
    return f"<section><h2>What was chosen</h2>{shown}{table(heads, rows, labels=3)}</section>"


def _options(report: TuneReport) -> str:
    rows = [
        [
            escape(option.role),
            escape(option.choice),
            escape(option.format),
            numbers.divergence(option.loss),
            numbers.percent(option.cost),
        ]
        for option in report.options
    ]
    heads = ["role", "choice", "format", "KL, summed over blocks", "cost, of dense"]
    return f"<section>{details('Every choice, by role', table(heads, rows, labels=3))}</section>"


def _setting(report: TuneReport) -> str:
    return f"<section>{details('Recipe', f'<pre>{escape(numbers.recipe_yaml(dict(report.recipe)))}</pre>')}</section>"
