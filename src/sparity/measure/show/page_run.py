"""The report as one self-contained web page: no script, nothing fetched, light and dark."""

from collections.abc import Callable, Sequence
from html import escape

from sparity.measure.charts import bars_and_maps
from sparity.measure.data.report import Candidate, Quality, Report, Speed, Spread
from sparity.measure.show import numbers, sentences
from sparity.measure.show.page import details, figure, page, table
from sparity.stages.change import Outcome

GRADES = {"excellent": "good", "good": "good", "acceptable": "fair", "poor": "bad"}
DIRECTIONS = {"faster": "good", "on par": "fair", "slower": "bad"}
NARROWEST_SCALE = 0.1  # of sparsity: smaller differences between layers should look small


def render_html(report: Report) -> str:
    """The whole page; write it to a file and open it, it needs nothing else."""
    sections = [_summary(report), _comparison(report), _quality_plots(report), _speed_plots(report)]
    sections.append(_larger(report))
    sections += [_candidate(report, candidate) for candidate in report.candidates]
    return page(f"{report.model}: sparse beside dense", sections, report.machine)


def _summary(report: Report) -> str:
    parts = [
        '<header><p class="kicker">Sparse beside dense</p>',
        f"<h1>{escape(report.model)}</h1>",
        f'<p class="faint">{escape(sentences.describe_model(report))}</p></header>',
    ]
    if len(report.candidates) == 1:
        candidate = report.candidates[0]
        said = f"<b>{escape(candidate.name)}.</b> {escape(sentences.summarise(candidate))}"
        parts += [f'<p class="lead">{said}</p>', _tiles(candidate)]
    else:
        parts.append(
            f'<p class="lead">{sentences.count(len(report.candidates), "sparse version")} of this model:</p><ul>'
        )
        for candidate in report.candidates:
            said = f"<b>{escape(candidate.name)}.</b> {escape(sentences.summarise_briefly(candidate))}"
            accepted = all(verdict.passed for verdict in candidate.verdicts)
            parts.append(f"<li>{said} {_verdict(accepted) if candidate.verdicts else ''}</li>")
        parts.append("</ul>")
    for whom, note in sentences.gather_notes(report):
        name = f"<b>{escape(whom)}:</b> " if whom else ""
        parts.append(f'<p class="note">{name}{escape(note)}</p>')
    limits = [verdict.passed for candidate in report.candidates for verdict in candidate.verdicts]
    if limits:
        kept = f"{sum(limits)} of {sentences.count(len(limits), 'limit')} kept"
        parts.append(f"<p>Acceptance: {_verdict(report.accepted)}, {kept}.</p>")
    return "".join(parts)


def _tiles(candidate: Candidate) -> str:
    tiles = [(value, what, "") for value, what in _what_changed(candidate)]
    for item in candidate.quality[:1]:
        tiles.append((numbers.change(item.change), f"perplexity on {item.text}: {item.grade}", _grade(item.grade)))
    if candidate.speed:
        for name, dense in sentences.baselines(candidate.speed).items():
            kind = DIRECTIONS[numbers.direction(dense.decode_ratio)]
            tiles.append((numbers.speed_ratio(dense.decode_ratio), f"decode speed beside {name}", kind))
    tiles.append(
        (numbers.size(candidate.bytes_sparse), f"weight files, {numbers.size(candidate.bytes_dense)} dense", "")
    )
    cells = (
        f'<div class="tile"><b class="{kind}">{escape(value)}</b><span>{escape(what)}</span></div>'
        for value, what, kind in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _what_changed(candidate: Candidate) -> list[tuple[str, str]]:
    """A number and its words for every kind of change."""
    found = []
    if any(item.zeros > 0 or item.target is not None for item in candidate.projections):
        found.append((numbers.percent(candidate.sparsity), "of the weights of the changed projections are zero"))
    if any(item.shape_before != item.shape_after for item in candidate.projections):
        found.append((numbers.amount(candidate.parameters), "parameters are left"))
    if candidate.skipped is not None:
        found.append((numbers.percent(candidate.skipped), "of the input channels are skipped at run time"))
    return found


def _comparison(report: Report) -> str:
    parts = ["<section><h2>Against dense</h2><h3>Size and cost</h3>", _size_table(report)]
    for (text, window), measured in sentences.gather_quality(report).items():
        predictions = f"{sentences.count(measured[0][1].tokens, 'prediction')} in windows of {window:,} tokens"
        parts += [
            f"<h3>Quality on {escape(text)}</h3>",
            f'<p class="faint">{predictions}</p>',
            _quality_table(measured),
        ]
    timed = [
        (candidate.name, f"batch {speed.batch}" if candidate.batched else "", speed)
        for candidate in report.candidates
        for speed in candidate.speeds
    ]
    if timed:
        protocols = dict.fromkeys(sentences.describe_protocol(speed) for *_, speed in timed)
        parts += ["<h3>Speed</h3>", *(f'<p class="faint">{escape(protocol)}</p>' for protocol in protocols)]
        parts.append(_speed_table(timed))
    return "".join([*parts, "</section>"])


def _size_table(report: Report) -> str:
    """Columns for parameters left and channels skipped are there when some candidate has them."""
    cut = any(candidate.parameters != report.parameters for candidate in report.candidates)
    skips = any(candidate.skipped is not None for candidate in report.candidates)
    dense = sorted({numbers.size(candidate.bytes_dense) for candidate in report.candidates})
    rows = [
        ["dense", numbers.percent(0), numbers.percent(0)]
        + [numbers.amount(report.parameters)] * cut
        + [numbers.percent(0)] * skips
        + [" / ".join(dense), "", "", ""]
    ]
    for candidate in report.candidates:
        effort = candidate.effort
        target = "" if candidate.target is None else f"<small>target {numbers.percent(candidate.target)}</small>"
        skipped = "" if candidate.skipped is None else numbers.percent(candidate.skipped)
        rows.append(
            [
                f"{escape(candidate.name)}<small>{escape('; '.join(candidate.stages))}</small>",
                f"{numbers.percent(candidate.sparsity)}{target}",
                numbers.percent(candidate.model_sparsity),
                *[numbers.amount(candidate.parameters)] * cut,
                *[skipped] * skips,
                f"{numbers.size(candidate.bytes_sparse)}<small>dense {numbers.size(candidate.bytes_dense)}</small>",
                numbers.seconds(effort.seconds),
                numbers.size(effort.peak_memory),
                numbers.amount(effort.calibration_tokens),
            ]
        )
    heads = ["model", "zeros in changed projections", "of all parameters"]
    heads += ["parameters"] * cut + ["channels skipped"] * skips
    heads += ["weight files", "time", "peak memory", "calibration tokens"]
    return table(heads, rows, dense_first=True)


def _quality_table(measured: Sequence[tuple[Candidate, Quality]]) -> str:
    dense = sorted({numbers.perplexity(item.dense_perplexity) for _, item in measured})
    rows = [["dense", " / ".join(dense), "", "", numbers.divergence(0), numbers.percent(1)]]
    for candidate, item in measured:
        kind = _grade(item.grade)
        rows.append(
            [
                escape(candidate.name),
                f"{numbers.perplexity(item.dense_perplexity)} → <b>{numbers.perplexity(item.perplexity)}</b>",
                f'<span class="{kind}">{numbers.change(item.change)}</span>',
                f'<span class="{kind}">{escape(item.grade)}</span>',
                numbers.divergence(item.kl),
                numbers.percent(item.top1),
            ]
        )
    return table(["model", "perplexity", "change", "grade", "KL, nats per token", "same top-1"], rows, dense_first=True)


def _speed_table(timed: Sequence[tuple[str, str, Speed]]) -> str:
    """`timed` holds names, what is said below them, and speeds."""
    rows = []
    for name, below, speed in timed:
        found = sentences.baselines(speed)
        for number, (dense, item) in enumerate(found.items()):
            said = [below, f"beside {dense}"] if len(found) > 1 else [below]
            small = ", ".join(filter(None, said))
            rows.append(
                [
                    ("" if number else escape(name)) + (f"<small>{escape(small)}</small>" if small else ""),
                    *_compared(item.pace.decode, speed.sparse.decode, item.decode_ratio, numbers.rate),
                    *_compared(
                        item.pace.first_token, speed.sparse.first_token, item.first_token_ratio, numbers.seconds
                    ),
                ]
            )
    heads = ["model", "decode tokens/s, dense", "sparse", "ratio", "time to first token, dense", "sparse", "ratio"]
    return table(heads, rows)


def _compared(dense: Spread, sparse: Spread, ratio: Spread, number: Callable[[float], str]) -> list[str]:
    cells = [f"{number(s.median)}<small>[{number(s.low)}-{number(s.high)}]</small>" for s in (dense, sparse)]
    low_high = f"<small>[{numbers.ratio(ratio.low)}-{numbers.ratio(ratio.high)}]</small>"
    kind = DIRECTIONS[numbers.direction(ratio)]
    return [*cells, f'<span class="{kind}">{numbers.speed_ratio(ratio)}</span>{low_high}']


def _larger(report: Report) -> str:
    """Speed of a random model that is large enough, beside that of a small one."""
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences.describe_larger(report))
    if report.larger is None:
        return ""
    if report.larger.speed:
        said += _speed_table([("random weights", "", report.larger.speed)])
        said += _speed_figures([("random weights", report.larger.speed)])
    return f"<section><h2>Speed of a larger model</h2>{said}</section>"


def _quality_plots(report: Report) -> str:
    figures = []
    zeros_only = all(
        candidate.skipped is None and candidate.parameters == report.parameters for candidate in report.candidates
    )
    x_name = "realised sparsity" if zeros_only else "weights not read for a token: zero, gone or skipped"
    for (text, window), measured in sentences.gather_quality(report).items():
        points = [bars_and_maps.Point(c.name, _spared(c, zeros_only), item.change) for c, item in measured]
        caption = f"{text}, windows of {window:,} tokens"
        figures.append(figure(caption, bars_and_maps.scatter(f"Perplexity against sparsity on {text}", points, x_name)))
    return f"<section><h2>Quality against sparsity</h2>{''.join(figures)}</section>" if figures else ""


def _spared(candidate: Candidate, zeros_only: bool) -> float:
    return candidate.sparsity if zeros_only else 1 - candidate.read


def _speed_plots(report: Report) -> str:
    timed = [(candidate.name, candidate.speed) for candidate in report.candidates if candidate.speed]
    return f"<section><h2>Speed</h2>{_speed_figures(timed)}</section>" if timed else ""


def _speed_figures(timed: Sequence[tuple[str, Speed]]) -> str:
    decode, first = [], []
    for name, speed in timed:
        found = sentences.baselines(speed)
        ratios = [numbers.ratio(item.decode_ratio.median) for item in found.values()]
        note = " and ".join(ratios) if len(ratios) > 1 else numbers.speed_ratio(speed.decode_ratio)
        rates = {dense: item.pace.decode for dense, item in found.items()}
        decode.append(bars_and_maps.BarGroup(name, {**rates, "sparse": speed.sparse.decode}, note))
        ratios = [numbers.ratio(item.first_token_ratio.median) for item in found.values()]
        note = " and ".join(ratios) if len(ratios) > 1 else numbers.speed_ratio(speed.first_token_ratio)
        times = {dense: item.pace.first_token for dense, item in found.items()}
        first.append(bars_and_maps.BarGroup(name, {**times, "sparse": speed.sparse.first_token}, note))
    return figure(
        "Decoding: longer bars are faster", bars_and_maps.grouped_bars("Decode speed", decode, "tokens/s", numbers.rate)
    ) + figure(
        "Time to first token: shorter bars are faster",
        bars_and_maps.grouped_bars("Time to first token", first, "seconds", numbers.seconds),
    )


def _candidate(report: Report, candidate: Candidate) -> str:
    parts = [f"<section><h2>{escape(candidate.name)}</h2>", f"<p>{escape(sentences.describe_changes(candidate))}</p>"]
    parts.append(f"<p>{escape(sentences.describe_effort(candidate))}</p>")
    parts.append(_verdicts(candidate))
    parts += _maps(report, candidate)
    if candidate.projections:
        words = sentences.count(len(candidate.projections), "changed projection")
        parts.append(details(words, _projections(candidate)))
    parts.append(details("Recipe", f"<pre>{escape(numbers.recipe_yaml(candidate.recipe))}</pre>"))
    return "".join([*parts, "</section>"])


def _maps(report: Report, candidate: Candidate) -> list[str]:
    """A map by block and role of everything that changed."""
    zeros = any(item.zeros > 0 or item.target is not None for item in candidate.projections)
    smaller = any(item.shape_before != item.shape_after for item in candidate.projections)
    quantities: list[tuple[str, sentences.Quantity, bool]] = [
        ("Realised sparsity by block and role", "zeros", zeros),
        ("Share of the dense model's weights that is left", "left", smaller),
        ("Share of input channels that is skipped at run time", "skipped", True),
    ]
    drawn = []
    for caption, quantity, wanted in quantities:
        cells = sentences.average_cells(candidate, quantity) if wanted else {}
        if cells:
            low, high = min(cells.values()), max(cells.values())
            slack = max(NARROWEST_SCALE - (high - low), 0) / 2
            title = f"{caption}: {candidate.name}"
            scale = (low - slack, high + slack)
            drawn.append(figure(caption, bars_and_maps.heat_map(title, cells, report.blocks, scale)))
    loss = sentences.average_cells(candidate, "loss")
    if loss:
        chart = bars_and_maps.heat_map(f"Loss of {candidate.name}", loss, report.blocks, (0.0, max(loss.values())))
        drawn.append(figure("Share of the output's energy lost on calibration text", chart))
    return drawn


def _projections(candidate: Candidate) -> str:
    """A row per projection; columns that no projection has anything for are left out."""
    items = candidate.projections
    columns: list[tuple[str, Callable[[Outcome], str]]] = [
        ("projection", lambda item: escape(item.name)),
        ("role", lambda item: escape(item.role)),
        ("block", lambda item: str(item.block)),
        ("shape", _shape),
        ("target", lambda item: _percent(item.target)),
        ("zeros", lambda item: numbers.percent(item.zeros)),
        ("skipped", lambda item: _percent(item.skipped)),
        ("bits", lambda item: "" if item.bits is None else f"{item.bits:.3g}"),
        ("loss", lambda item: _percent(item.loss)),
        ("stages", lambda item: escape(", ".join(item.stages)) if len(candidate.stages) > 1 else ""),
    ]
    shown = [(head, cell) for head, cell in columns if any(cell(item) for item in items)]
    return table([head for head, _ in shown], [[cell(item) for _, cell in shown] for item in items])


def _shape(item: Outcome) -> str:
    before, after = (" x ".join(f"{side:,}" for side in shape) for shape in (item.shape_before, item.shape_after))
    return before if before == after else f"{before} → {after}"


def _percent(share: float | None) -> str:
    return "" if share is None else numbers.percent(share)


def _verdicts(candidate: Candidate) -> str:
    items = (
        f"<li>{_verdict(verdict.passed)} {escape(verdict.limit)}, reached {escape(verdict.reached)}</li>"
        for verdict in candidate.verdicts
    )
    return f'<ul class="verdicts">{"".join(items)}</ul>' if candidate.verdicts else ""


def _verdict(passed: bool) -> str:
    return '<span class="pass">✓ pass</span>' if passed else '<span class="fail">✗ missed</span>'


def _grade(grade: str) -> str:
    return GRADES.get(grade, "")
