"""What sparsity costs in each part of a model, as one self-contained page."""

from collections.abc import Sequence

from sparity.measure.charts.bars_and_maps import heat_map
from sparity.measure.charts.lines_matrix import Line, line_plot
from sparity.measure.data.sensitivity_report import Sensitivity, SensitivityReport
from sparity.measure.show import numbers, sentences
from sparity.measure.show.page import details, figure, page, table
from sparity.visible import escape


def render_sensitivity(report: SensitivityReport) -> str:
    """The whole page; write it to a file and open it, it needs nothing else."""
    sections = [_summary(report), _halves(report), _layers(report), _blocks(report), _setting(report)]
    return page(f"{report.model}: sensitivity", sections, report.machine)


def describe_sensitivity(report: SensitivityReport) -> str:
    """What was done to every part, and measured on what."""
    ratios = sentences.join([numbers.percent(ratio) for ratio in report.ratios])
    return (
        f"Every part made sparse alone by {report.method}, to {ratios}; measured on {report.tokens:,} predictions of "
        f"{report.text}, dense perplexity {numbers.perplexity(report.dense_perplexity)}."
    )


def most_sensitive(report: SensitivityReport, count: int = 5) -> list[Sensitivity]:
    """The layers that cost most per share of the parameters, at the ratio nearest to a half."""
    middle = min(report.ratios, key=lambda ratio: abs(ratio - 0.5))
    return sorted(report.of("layer", middle), key=lambda row: -row.kl / row.parameters)[:count]


def _summary(report: SensitivityReport) -> str:
    return (
        '<header><p class="kicker">Sensitivity</p>'
        f'<h1>{escape(report.model)}</h1><p class="lead">{escape(describe_sensitivity(report))}</p></header>'
    )


def _halves(report: SensitivityReport) -> str:
    whole = [row for row in report.rows if row.block is None]
    lines = [
        Line(f"{kind}, all blocks", {row.sparsity: row.kl for row in whole if row.part == kind})
        for kind in dict.fromkeys(row.part for row in whole)
    ]
    drawing = line_plot("KL by sparsity", lines, "sparsity", "KL, nats per token", numbers.divergence)
    rows = [_cells(row, row.name) for row in whole]
    heads = ["part", "parameters", "FLOPs", "sparsity", "KL", "perplexity", "change"]
    shown = figure("KL to the dense model when one half of every block is made sparse", drawing)
    return f"<section><h2>Attention against MLP</h2>{shown}{table(heads, rows)}</section>"


def _layers(report: SensitivityReport) -> str:
    drawings = []
    for ratio in report.ratios:
        cells = {(row.block, row.role): row.kl for row in report.of("layer", ratio) if row.block is not None}
        scale = (0.0, max(cells.values(), default=0.0))
        drawing = heat_map(f"KL at {numbers.percent(ratio)}", cells, len(report.blocks), scale, numbers.divergence)
        drawings.append(figure(f"KL when only this layer is made sparse, to {numbers.percent(ratio)}", drawing))
    heads = ["layer", "parameters", "FLOPs", "sparsity", "KL", "perplexity", "change"]
    rows = [_cells(row, row.name) for row in report.of("layer")]
    return f"<section><h2>Layers</h2>{''.join(drawings)}{details('All layers', table(heads, rows))}</section>"


def _blocks(report: SensitivityReport) -> str:
    lines = [
        Line(
            f"{kind} at {numbers.percent(ratio)}", {float(row.block): row.kl for row in found if row.block is not None}
        )
        for kind in ("attention", "mlp")
        for ratio in _ends(report.ratios)
        if (found := report.of(kind, ratio))
    ]
    drawing = line_plot("KL by block", lines, "block", "KL, nats per token", numbers.divergence)
    heads = ["block", "cosine of inputs and outputs", "tokens per expert, fewest to most"]
    rows = [
        [str(facts.block), f"{facts.cosine:.4f}", _spread_of_tokens(list(facts.expert_tokens.values()))]
        for facts in report.blocks
    ]
    experts = any(facts.expert_tokens for facts in report.blocks)
    cut = len(heads) if experts else 2
    facts_table = table(heads[:cut], [row[:cut] for row in rows])
    shown = figure("KL when one half of this block is made sparse", drawing)
    return f"<section><h2>Blocks</h2>{shown}{facts_table}</section>"


def _setting(report: SensitivityReport) -> str:
    return f"<section>{details('Recipe', f'<pre>{escape(numbers.recipe_yaml(dict(report.recipe)))}</pre>')}</section>"


def _cells(row: Sensitivity, name: str) -> list[str]:
    return [
        escape(name),
        numbers.percent(row.parameters),
        numbers.percent(row.flops),
        numbers.percent(row.sparsity),
        numbers.divergence(row.kl),
        numbers.perplexity(row.perplexity),
        numbers.change(row.change),
    ]


def _spread_of_tokens(counts: Sequence[int]) -> str:
    return f"{min(counts):,} to {max(counts):,}" if counts else ""


def _ends(ratios: Sequence[float]) -> list[float]:
    middle = min(ratios, key=lambda ratio: abs(ratio - 0.5))
    return list(dict.fromkeys((middle, ratios[-1])))
