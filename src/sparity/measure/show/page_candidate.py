"""One sparse model on a run's page: what its stages did, as words, tiles, heat maps and a table of projections."""

from collections.abc import Iterable, Iterator

from sparity.measure.charts.bars_and_maps import heat_map
from sparity.measure.charts.lines_matrix import Line, line_plot
from sparity.measure.data.outcome import Outcome, mean_by_cell
from sparity.measure.data.report import Candidate, Report
from sparity.measure.show import numbers, sentences
from sparity.measure.show.page import column_table, details, figure
from sparity.visible import escape

NARROWEST_SCALE = 0.1  # of shares: smaller differences between projections should look small


def change_tiles(report: Report, candidate: Candidate) -> list[tuple[str, str]]:
    """A number and what it says, for every kind of change that there is."""
    totals = candidate.totals
    tiles = []
    if totals.has_zeros:
        where = sentences.count(len(totals.zeroed), "projection")
        tiles.append((numbers.percent(candidate.sparsity), f"of the weights in {where} are zero"))
    if (left := report.left(candidate)) is not None:
        tiles.append((numbers.percent(left), "of the parameters are left"))
    if totals.bits is not None:
        tiles.append((numbers.bits(totals.bits), "per stored weight"))
    if totals.skipped is not None:
        tiles.append((numbers.percent(totals.skipped), "of the input channels are skipped at run time"))
    return tiles


def candidate_section(report: Report, candidate: Candidate) -> str:
    """Everything about one sparse model but what it is compared by."""
    several = [sentences.describe_stages(candidate)] if len(candidate.stages) > 1 else []  # one is in the name
    said = [sentences.describe_changes(report, candidate), *several, sentences.describe_effort(candidate)]
    parts = [f"<section><h2>{escape(candidate.name)}</h2>", *(f"<p>{escape(sentence)}</p>" for sentence in said)]
    parts += [_verdicts(candidate), *_heat_maps(report, candidate), *_curves(candidate)]
    if candidate.changes:
        outcomes = candidate.totals.outcomes
        parts.append(details(sentences.count(len(outcomes), "projection"), _projections(outcomes)))
    parts.append(details("Recipe", f"<pre>{escape(numbers.recipe_yaml(candidate.recipe))}</pre>"))
    return "".join([*parts, "</section>"])


def verdict_mark(passed: bool) -> str:
    """Whether a limit was kept, as HTML."""
    return '<span class="pass">✓ pass</span>' if passed else '<span class="fail">✗ missed</span>'


def _verdicts(candidate: Candidate) -> str:
    items = (
        f"<li>{verdict_mark(verdict.passed)} {escape(verdict.limit)}, reached {escape(verdict.reached)}</li>"
        for verdict in candidate.verdicts
    )
    return f'<ul class="verdicts">{"".join(items)}</ul>' if candidate.verdicts else ""


def _heat_maps(report: Report, candidate: Candidate) -> Iterator[str]:
    """Zeros, what is left, what is skipped, and the loss of every stage that measured it."""
    totals = candidate.totals
    maps = []
    if totals.has_zeros:
        cells = mean_by_cell((each.cell, each.zeros, each.size) for each in totals.zeroed)
        maps.append(("Zeros by block and role", cells, _shares_scale(cells)))
    if totals.reshaped:
        cells = mean_by_cell((each.cell, each.left, each.size_before) for each in totals.outcomes)
        maps.append(("What is left of each projection's size", cells, _shares_scale(cells)))
    if totals.skipping:
        cells = mean_by_cell((each.cell, each.skipped, each.size) for each in totals.skipping)
        maps.append(("Input channels that are skipped at run time", cells, _shares_scale(cells)))
    lossy = dict.fromkeys(change.stage for change in candidate.changes if change.loss is not None)
    for stage in lossy:
        found = (change for change in candidate.changes if change.stage == stage)
        cells = mean_by_cell(((change.block, change.role), change.loss, change.size_before) for change in found)
        by = f" by {stage}" if len(lossy) > 1 else ""
        caption = f"Share of the output's energy on calibration text that was lost{by}"
        maps.append((caption, cells, (0.0, max(cells.values(), default=0.0))))
    for caption, cells, scale in maps:
        if cells:
            yield figure(caption, heat_map(f"{caption}, {candidate.name}", cells, report.blocks, scale))


def _curves(candidate: Candidate) -> Iterator[str]:
    """The losses of every stage that trained, by step."""
    for stage in dict.fromkeys(curve.stage for curve in candidate.curves):
        of_stage = [curve for curve in candidate.curves if curve.stage == stage and curve.steps]
        lines = [Line(curve.name, dict(zip(curve.steps, curve.values, strict=True))) for curve in of_stage]
        if lines:
            caption = f"Loss while {stage} trained"
            yield figure(caption, line_plot(f"{caption}, {candidate.name}", lines, "step", "loss", numbers.divergence))


def _shares_scale(cells: dict[tuple[int, str], float]) -> tuple[float, float]:
    low, high = min(cells.values(), default=0.0), max(cells.values(), default=0.0)
    slack = max(NARROWEST_SCALE - (high - low), 0) / 2
    return max(low - slack, 0.0), min(high + slack, 1.0)


def _projections(outcomes: tuple[Outcome, ...]) -> str:
    """A row per projection, in it a line per stage; what no stage has to do with has no column."""
    columns: list[tuple[str, list[str]]] = [
        ("projection", [escape(each.name) for each in outcomes]),
        ("stages", ["<br>".join(escape(change.stage) for change in each.changes) for each in outcomes]),
        ("role", [escape(each.cell[1]) for each in outcomes]),
        ("block", [str(each.cell[0]) for each in outcomes]),
        ("shape", [_shape(each) for each in outcomes]),
        ("zeros", [numbers.percent(each.zeros) for each in outcomes]),
    ]
    optional = (
        ("target", [_by_stage(change.target for change in each.changes) for each in outcomes]),
        ("skipped", ["" if each.skipped is None else numbers.percent(each.skipped) for each in outcomes]),
        ("bits", ["" if each.bits is None else f"{each.bits:g}" for each in outcomes]),
        ("loss", [_by_stage(change.loss for change in each.changes) for each in outcomes]),
    )
    return column_table([*columns, *((head, cells) for head, cells in optional if any(cells))], labels=3)


def _shape(each: Outcome) -> str:
    before, after = (f"{rows:,} x {columns:,}" for rows, columns in each.shapes)
    return f"{before}<br>→ {after}" if each.reshaped else before


def _by_stage(shares: Iterable[float | None]) -> str:
    """A line per stage, as in the column of stages, with a dash where it has no share; nothing where none has any."""
    found = list(shares)
    if all(share is None for share in found):
        return ""
    return "<br>".join("-" if share is None else numbers.percent(share) for share in found)
