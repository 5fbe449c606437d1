"""The report as one self-contained web page: no script, nothing fetched, light and dark."""

from collections.abc import Callable, Sequence

from sparity.measure.charts import bars_and_maps
from sparity.measure.data.report import Candidate, Quality, Report, Speed, Spread
from sparity.measure.show import numbers, sentences
from sparity.measure.show.page import column_table, figure, page, table
from sparity.measure.show.page_candidate import candidate_section, change_tiles, verdict_mark
from sparity.measure.show.page_contestants import contestants_section
from sparity.measure.show.page_tasks import task_table
from sparity.visible import escape

GRADES = {"excellent": "good", "good": "good", "acceptable": "fair", "poor": "bad"}
DIRECTIONS = {"faster": "good", "on par": "fair", "slower": "bad"}


def render_html(report: Report) -> str:
    """The whole page; write it to a file and open it, it needs nothing else."""
    sections = [_summary(report), _comparison(report), _quality_plots(report), _speed_plots(report)]
    sections += [contestants_section(report), _larger(report)]
    sections += [candidate_section(report, candidate) for candidate in report.candidates]
    return page(f"{report.model}: sparse beside dense", sections, report.machine)


def _summary(report: Report) -> str:
    parts = [
        '<header><p class="kicker">Sparse beside dense</p>',
        f"<h1>{escape(report.model)}</h1>",
        f'<p class="faint">{escape(sentences.describe_model(report))}</p></header>',
    ]
    if len(report.candidates) == 1:
        candidate = report.candidates[0]
        said = f"<b>{escape(candidate.name)}.</b> {escape(sentences.summarise(report, candidate))}"
        parts += [f'<p class="lead">{said}</p>', _tiles(report, candidate)]
    else:
        parts.append(
            f'<p class="lead">{sentences.count(len(report.candidates), "sparse version")} of this model:</p><ul>'
        )
        for candidate in report.candidates:
            said = f"<b>{escape(candidate.name)}.</b> {escape(sentences.summarise_briefly(report, candidate))}"
            accepted = all(verdict.passed for verdict in candidate.verdicts)
            parts.append(f"<li>{said} {verdict_mark(accepted) if candidate.verdicts else ''}</li>")
        parts.append("</ul>")
    for whom, note in sentences.gather_notes(report):
        name = f"<b>{escape(whom)}:</b> " if whom else ""
        parts.append(f'<p class="note">{name}{escape(note)}</p>')
    limits = [verdict.passed for candidate in report.candidates for verdict in candidate.verdicts]
    if limits:
        kept = f"{sum(limits)} of {sentences.count(len(limits), 'limit')} kept"
        parts.append(f"<p>Acceptance: {verdict_mark(report.accepted)}, {kept}.</p>")
    return "".join(parts)


def _tiles(report: Report, candidate: Candidate) -> str:
    tiles = [(value, what, "") for value, what in change_tiles(report, candidate)]
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


def _comparison(report: Report) -> str:
    parts = ["<section><h2>Against dense</h2><h3>Size and cost of the run</h3>", _size_table(report)]
    for (text, window), measured in sentences.gather_quality(report).items():
        predictions = f"{sentences.count(measured[0][1].tokens, 'prediction')} in windows of {window:,} tokens"
        parts += [
            f"<h3>Quality on {escape(text)}</h3>",
            f'<p class="faint">{predictions}</p>',
            _quality_table(measured),
        ]
    for candidate in report.candidates:
        if candidate.tasks:
            parts += [f"<h3>Tasks: {escape(candidate.name)}</h3>", task_table(candidate.tasks)]
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
    """Dense, then every candidate; what no candidate has anything of has no column."""
    dense_sizes = sorted({numbers.size(candidate.bytes_dense) for candidate in report.candidates})
    amount, none = numbers.amount(report.parameters), numbers.percent(0)
    columns: list[tuple[str, str, list[str]]] = [
        ("zeros in projections", none, [_zeros(candidate) for candidate in report.candidates]),
        ("zeros of all parameters", none, [_zeros_of_all(candidate) for candidate in report.candidates]),
        ("parameters left", amount, [_left(report, candidate) for candidate in report.candidates]),
        ("bits per weight", "", [_bits(candidate) for candidate in report.candidates]),
        ("channels skipped at run time", none, [_skipped(candidate) for candidate in report.candidates]),
    ]
    names = [escape(candidate.name) for candidate in report.candidates]
    files = [
        f"{numbers.size(c.bytes_sparse)}<small>dense {numbers.size(c.bytes_dense)}</small>" for c in report.candidates
    ]
    effort = [candidate.effort for candidate in report.candidates]
    shown = [
        ("model", ["dense", *names]),
        *((head, [dense, *cells]) for head, dense, cells in columns if any(cells)),
        ("weight files", [" / ".join(dense_sizes), *files]),
        ("time of the run", ["", *(numbers.seconds(each.seconds) for each in effort)]),
        ("peak memory", ["", *(numbers.size(each.peak_memory) for each in effort)]),
        ("calibration tokens", ["", *(numbers.amount(each.calibration_tokens) for each in effort)]),
    ]
    return column_table(shown, dense_first=True)


def _zeros(candidate: Candidate) -> str:
    return _share(candidate.sparsity, candidate.target) if candidate.totals.has_zeros else ""


def _zeros_of_all(candidate: Candidate) -> str:
    return numbers.percent(candidate.model_sparsity) if candidate.totals.has_zeros else ""


def _left(report: Report, candidate: Candidate) -> str:
    left = report.left(candidate)
    return "" if left is None else f"{numbers.amount(candidate.parameters)}<small>{numbers.percent(left)}</small>"


def _bits(candidate: Candidate) -> str:
    bits = candidate.totals.bits
    return "" if bits is None else numbers.bits(bits)


def _skipped(candidate: Candidate) -> str:
    skipped = candidate.totals.skipped
    return "" if skipped is None else _share(skipped, candidate.totals.skip_target)


def _share(share: float, target: float | None) -> str:
    return numbers.percent(share) + ("" if target is None else f"<small>target {numbers.percent(target)}</small>")


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
    """Perplexity against zeros, or, where weights are cut or skipped too, against all that a token does without."""
    measured = sentences.gather_quality(report)
    if not measured:
        return ""
    only_zeros = not any(candidate.totals.reshaped or candidate.totals.skipping for candidate in report.candidates)
    name, axis = ("sparsity", "realised sparsity") if only_zeros else ("weights spared", "weights spared per token")
    said = "" if only_zeros else f"<p>{escape(sentences.SPARED)}</p>"
    for (text, window), found in measured.items():
        points = [
            bars_and_maps.Point(
                candidate.name,
                candidate.sparsity if only_zeros else candidate.totals.spared(report.parameters),
                item.change,
            )
            for candidate, item in found
        ]
        drawn = bars_and_maps.scatter(f"Perplexity against {name} on {text}", points, axis)
        said += figure(f"{text}, windows of {window:,} tokens", drawn)
    return f"<section><h2>Quality against {name}</h2>{said}</section>"


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


def _grade(grade: str) -> str:
    return GRADES.get(grade, "")
