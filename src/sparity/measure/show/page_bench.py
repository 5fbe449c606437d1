"""A benchmark as one self-contained page: a table and bars for each batch size."""

from collections.abc import Callable

from sparity.measure.charts import bars_and_maps
from sparity.measure.data.bench_report import BenchReport, Ratio
from sparity.measure.data.report import Spread
from sparity.measure.show import numbers, sentences, sentences_bench
from sparity.measure.show.page import figure, page, table
from sparity.measure.show.page_run import DIRECTIONS
from sparity.visible import escape

OURS = ("this model, decoding", "this model, first token")  # what stands in an opponent's row is not the opponent's
HEADS = ("model", "time to first token", "per token", "tokens/s", "peak memory", *OURS)


def render_bench(report: BenchReport) -> str:
    """The whole page; write it to a file and open it, it needs nothing else."""
    sections = [_summary(report), _weights(report), *(_batch(report, batch) for batch in report.batches)]
    return page(f"{report.model}: generation speed", sections, report.machine)


def _summary(report: BenchReport) -> str:
    notes = [*(f"Not run: {skip.reason}." for skip in report.skipped), *report.notes]
    return "".join(
        [
            '<header><p class="kicker">Generation speed</p>',
            f'<h1>{escape(report.model)}</h1><p class="faint">{escape(report.architecture)}</p></header>',
            _found(report),
            f'<p class="faint">{escape(sentences_bench.describe_protocol(report))}</p>',
            *(f'<p class="note">{escape(note)}</p>' for note in notes),
        ]
    )


def _found(report: BenchReport) -> str:
    items = "".join(f"<li>{escape(said)}</li>" for said in sentences_bench.describe_results(report))
    return f"<ul>{items}</ul>" if items else "<p>It was measured by itself: there is nothing to compare it with.</p>"


def _weights(report: BenchReport) -> str:
    rows = [
        [escape(runner.name), escape(runner.computed), numbers.size(runner.weight_bytes)] for runner in report.runners
    ]
    shown = table(["model", "computed by", "weights in memory"], rows, labels=2)
    return f'<section><h2>Contenders</h2>{shown}<p class="faint">{escape(sentences_bench.MEMORY)}</p></section>'


def _batch(report: BenchReport, batch: int) -> str:
    rows, bars = [], []
    for timing, ratio in report.at(batch):
        peak = "" if timing.peak_memory is None else numbers.size(timing.peak_memory)
        rows.append(
            [
                escape(timing.name),
                _cell(timing.pace.first_token, numbers.seconds),
                _cell(timing.token, numbers.seconds),
                _cell(timing.pace.decode, numbers.rate),
                peak,
                *_ratios(ratio),
            ]
        )
        series = "compared with" if ratio else "this model"
        note = f"this model: {numbers.ratio(ratio.decode.median)}" if ratio else ""
        bars.append((timing, bars_and_maps.BarGroup(timing.name, {series: timing.pace.decode}, note)))
    drawing = bars_and_maps.grouped_bars(
        f"Tokens per second at batch {batch}", [group for _, group in bars], "tokens/s", numbers.rate
    )
    first = bars_and_maps.grouped_bars(
        f"Time to first token at batch {batch}",
        [
            bars_and_maps.BarGroup(group.label, dict.fromkeys(group.bars, timing.pace.first_token))
            for timing, group in bars
        ],
        "seconds",
        numbers.seconds,
    )
    return (
        f"<section><h2>{sentences.count(batch, 'sequence')} at a time</h2>{table(HEADS, rows)}"
        f"{figure('Decoding: longer bars are faster', drawing)}"
        f"{figure('Time to first token: shorter bars are faster', first)}</section>"
    )


def _cell(values: Spread, number: Callable[[float], str]) -> str:
    return f"{number(values.median)}<small>[{number(values.low)}-{number(values.high)}]</small>"


def _ratios(ratio: Ratio | None) -> list[str]:
    """The subject's ratios to an opponent, as cells; the subject's own row has none."""
    if ratio is None:
        return ["", ""]
    return [
        f'<span class="{DIRECTIONS[numbers.direction(values)]}">{numbers.speed_ratio(values)}</span>'
        f"<small>[{numbers.ratio(values.low)}-{numbers.ratio(values.high)}]</small>"
        for values in (ratio.decode, ratio.first_token)
    ]
