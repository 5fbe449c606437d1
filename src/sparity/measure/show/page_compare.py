"""Several models as one self-contained page: a table, quality against speed, and every task with its interval."""

from sparity.measure.charts.tradeoff import dominated, tradeoff
from sparity.measure.data.comparison_report import ComparisonReport
from sparity.measure.data.report import Spread
from sparity.measure.show import numbers, sentences, sentences_bench
from sparity.measure.show.page import column_table, figure, page, table
from sparity.measure.show.page_run import DIRECTIONS, GRADES
from sparity.measure.show.page_tasks import HEADS, task_table
from sparity.measure.show.sentences_tasks import score_words
from sparity.visible import escape


def render_comparison(report: ComparisonReport) -> str:
    """The whole page; write it to a file and open it, it needs nothing else."""
    sections = [_summary(report), _overview(report), _picture(report), _texts(report), _tasks(report)]
    return page(f"{report.first.name}: models compared", sections, report.machine)


def _summary(report: ComparisonReport) -> str:
    others = sentences.join([model.name for model in report.models[1:]])
    skipped = [f"Not run: {skip.reason}." for skip in report.speed.skipped] if report.speed else []
    notes = [*report.notes, *skipped, *(report.speed.notes if report.speed else ())]
    return "".join(
        [
            '<header><p class="kicker">Models compared</p>',
            f"<h1>{escape(report.first.name)}</h1>",
            f'<p class="lead">Beside it: {escape(others)}. Changes, KL and ratios are relative to the first model.</p>',
            "</header>",
            *(f'<p class="note">{escape(note)}</p>' for note in notes),
        ]
    )


def _overview(report: ComparisonReport) -> str:
    """A row per model; what was not measured has no column."""
    models = report.models
    names = [
        escape(model.name) + (f"<small>{escape(', '.join(model.runtime))}</small>" if model.runtime else "")
        for model in models
    ]
    columns: list[tuple[str, list[str]]] = [
        ("model", names),
        ("parameters", [numbers.amount(model.parameters) for model in models]),
        ("zeros", [numbers.percent(model.zeros) for model in models]),
        ("weight files", [numbers.size(model.file_bytes) for model in models]),
    ]
    if report.speed:
        memory = [report.memory(model.name) or (0, None) for model in models]
        columns += [
            ("weights in memory", [numbers.size(weights) for weights, _ in memory]),
            ("peak memory", ["" if peak is None else numbers.size(peak) for _, peak in memory]),
            ("tokens/s", [_rate(report.decode(model.name)) for model in models]),
            ("ratio", [_ratio(report.faster(model.name)) for model in models]),
        ]
    if report.first.quality:
        text = report.first.quality[0].text
        columns.append((f"perplexity, {text}", [numbers.perplexity(model.quality[0].perplexity) for model in models]))
    protocol = sentences_bench.describe_protocol(report.speed, "the model of that row") if report.speed else ""
    said = f'<p class="faint">{escape(protocol)}</p>' if protocol else ""
    return f"<section><h2>All models</h2>{column_table(columns, dense_first=True)}{said}</section>"


def _rate(rate: Spread | None) -> str:
    return (
        ""
        if rate is None
        else f"{numbers.rate(rate.median)}<small>[{numbers.rate(rate.low)}-{numbers.rate(rate.high)}]</small>"
    )


def _ratio(ratio: Spread | None) -> str:
    if ratio is None:
        return ""
    kind = DIRECTIONS[numbers.direction(ratio)]
    low_high = f"<small>[{numbers.ratio(ratio.low)}-{numbers.ratio(ratio.high)}]</small>"
    return f'<span class="{kind}">{numbers.speed_ratio(ratio)}</span>{low_high}'


def _picture(report: ComparisonReport) -> str:
    found = report.contestants()
    if not found:
        return ""
    drawn = tradeoff("Quality against speed", found)
    beaten = dominated(found)
    said = "; ".join(f"{name} by {winner}" for name, winner in beaten.items())
    below = f"<p>Beaten in both, hollow in the picture: {escape(said)}.</p>" if beaten else ""
    caption = f"Perplexity on {report.first.quality[0].text} against decode speed: the best are at the lower right"
    return f"<section><h2>Quality against speed</h2>{figure(caption, drawn)}{below}</section>"


def _texts(report: ComparisonReport) -> str:
    parts = []
    for place, text in enumerate(report.first.quality):
        rows = []
        for model in report.models:
            item = model.quality[place]
            own = model is report.first
            kind = "" if own else GRADES.get(item.grade, "")
            rows.append(
                [
                    escape(model.name),
                    numbers.perplexity(item.perplexity),
                    "" if own else f'<span class="{kind}">{numbers.change(item.change)}</span>',
                    numbers.divergence(item.kl),
                    numbers.percent(item.top1),
                ]
            )
        shown = table(["model", "perplexity", "change", "KL, nats per token", "same top-1"], rows, dense_first=True)
        predictions = f"{sentences.count(text.tokens, 'prediction')} in windows of {text.window:,} tokens"
        parts.append(f'<h3>{escape(text.text)}</h3><p class="faint">{predictions}</p>{shown}')
    return f"<section><h2>Texts</h2>{''.join(parts)}</section>" if parts else ""


def _tasks(report: ComparisonReport) -> str:
    if not report.first.tasks:
        return ""
    rows = [
        [f"{escape(task.name)}<small>{escape(task.source)}</small>", escape(score.metric)]
        + [score_words(model.tasks[place].scores[number]) for model in report.models]
        for place, task in enumerate(report.first.tasks)
        for number, score in enumerate(task.scores)
    ]
    heads = ["task", "metric", *(model.name for model in report.models)]
    parts = [table(heads, rows, labels=2), '<p class="faint">Values with their standard errors.</p>']
    for model in report.models[1:]:
        own = (*HEADS[:3], report.first.name, model.name, *HEADS[5:])
        parts.append(f"<h3>{escape(model.name)}</h3>{task_table(model.differences, own)}")
    return f"<section><h2>Tasks</h2>{''.join(parts)}</section>"
