"""Charts as inline SVG: no script, no library, coloured by the page's CSS variables with defaults of their own."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sparity.measure.charts.drawing import (
    CHARACTER,
    DENSE,
    FONT,
    SPARSE,
    WIDTH,
    cut,
    draw_line,
    draw_text,
    round_ticks,
    scale_legend,
    strength,
    svg,
)
from sparity.measure.data.report import Spread
from sparity.measure.show import numbers
from sparity.visible import escape

LOG_BEYOND = 10.0  # a change, or a multiple of the smallest one, from where a linear axis would hide the rest
LINEAR_WITHIN = 0.01  # a logarithmic axis of changes is linear around zero, so that it can show none at all
SMALLEST_CHANGE = 0.001


@dataclass(frozen=True)
class BarGroup:
    """One candidate: its bars by series name, and a few words shown under its label."""

    label: str
    bars: Mapping[str, Spread]
    note: str = ""


@dataclass(frozen=True)
class Point:
    """One candidate on one text: a share of weights, and the relative change of perplexity, which may be infinite."""

    label: str
    share: float
    change: float


def grouped_bars(title: str, groups: Sequence[BarGroup], unit: str, number: Callable[[float], str]) -> str:
    """Horizontal bars from zero to the median, with whiskers from the lowest to the highest measurement.

    The first series is drawn as dense, the last as sparse and those between as a paler sparse; a group may have bars of
    some series only. `unit` names the axis; `number` writes the values beside the bars.
    """
    longest = max((len(group.label) for group in groups), default=0)
    left = min(max(230.0, longest * CHARACTER + 22), 290.0)
    right, bar, pad = 90.0, 17.0, 20.0
    top = 58.0
    widest = sorted(groups, key=lambda group: -len(group.bars))  # it has the order of all
    series = list(dict.fromkeys(name for group in widest for name in group.bars))
    paints = dict(zip(series, _paints(len(series)), strict=True))
    finite = [bars.high for group in groups for bars in group.bars.values() if math.isfinite(bars.high)]
    ticks = round_ticks(0.0, max(finite, default=1.0) or 1.0)
    scale = (WIDTH - left - right) / ticks[-1]
    rows = max((len(group.bars) for group in groups), default=1)
    step = rows * bar + pad
    bottom = top + len(groups) * step
    parts = [_legend(paints, left), draw_text(WIDTH - 4, 20, unit, "end", faint=True)]
    for tick in ticks:
        x = left + tick * scale
        parts += [
            draw_line(x, top - 8, x, bottom - pad + 8, 0.15),
            draw_text(x, top - 14, f"{tick:g}", "middle", faint=True),
        ]
    said = []
    for place, group in enumerate(groups):
        y = top + place * step
        middle = y + rows * bar / 2
        parts.append(draw_text(left - 14, middle - (5 if group.note else -4), cut(group.label, left - 20), "end"))
        if group.note:
            parts.append(draw_text(left - 14, middle + 12, cut(group.note, left - 20), "end", faint=True))
        for row, name in enumerate(name for name in series if name in group.bars):
            parts.append(_bar(left, y + row * bar, bar, scale, group.bars[name], paints[name], number))
            said.append(f"{group.label}, {name}: {numbers.spread(group.bars[name], number)}")
    return svg(title, "; ".join(said), bottom - pad + 16, parts)


def heat_map(
    title: str,
    cells: Mapping[tuple[int, str], float],
    blocks: int,
    scale: tuple[float, float],
    number: Callable[[float], str] = numbers.percent,
) -> str:
    """Blocks from left to right, roles from top to bottom; the value in a cell sets the strength of its colour.

    Args:
        title: what the values are.
        cells: value by block and role; cells that are missing stay empty.
        blocks: number of blocks of the model.
        scale: the values of the faintest and of the strongest colour.
        number: writes a value; fractions are written in percent, without the sign where it is narrow.
    """
    left, top, height = 100.0, 44.0, 24.0
    roles = list(dict.fromkeys(role for _, role in cells))
    columns = max([blocks, *(block + 1 for block, _ in cells)])
    width = (WIDTH - left - 8) / max(columns, 1)
    parts = [scale_legend(scale, number)]
    parts += [
        draw_text(left - 10, top + row * height + 16, cut(role, left - 12), "end") for row, role in enumerate(roles)
    ]
    for (block, role), value in cells.items():
        x, y = left + block * width, top + roles.index(role) * height
        gap = 1 if width > 5 else 0
        about = f"<title>{escape(f'block {block}, {role}: {number(value)}')}</title>"
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - gap:.1f}" height="{height - 1:.1f}" rx="{gap * 2}" '
            f'fill="{SPARSE}" fill-opacity="{strength(value, scale):.2f}">{about}</rect>'
        )
        if width >= 4.5 * CHARACTER:
            words = f"{value * 100:.1f}" if number is numbers.percent else number(value)
            parts.append(draw_text(x + (width - gap) / 2, y + 16, words, "middle", small=True))
    bottom = top + len(roles) * height
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, columns) if step * width >= 26 or step >= columns)
    parts += [
        draw_text(left + (block + 0.5) * width, bottom + 16, str(block), "middle", faint=True)
        for block in range(0, columns, every)
    ]
    parts.append(draw_text(left - 10, bottom + 16, "block", "end", faint=True))
    values = cells.values()
    span = f", from {numbers.percent(min(values))} to {numbers.percent(max(values))}" if cells else ""
    return svg(title, f"{len(roles)} roles in {columns} blocks{span}", bottom + 26, parts)


def scatter(title: str, points: Sequence[Point], x_name: str = "realised sparsity") -> str:
    """A share of weights, by default of zeros, against change of perplexity, dense at the origin.

    The y axis is logarithmic when the perplexities lie far apart; infinite ones are triangles on its upper edge.
    """
    left, right, top, height = 80.0, 30.0, 40.0, 340.0
    every = [Point("dense", 0.0, 0.0), *(point for point in points if not math.isnan(point.change))]
    changes = [point.change for point in every if math.isfinite(point.change)]
    sizes = [max(abs(change), SMALLEST_CHANGE) for change in changes[1:]] or [SMALLEST_CHANGE]
    logarithmic = max(sizes) > LOG_BEYOND * min(*sizes, 1.0)
    ticks = _change_ticks(min(changes), max(changes)) if logarithmic else round_ticks(min(changes), max(*changes, 0.01))
    low, high = _height(min(*changes, ticks[0]), logarithmic), _height(max(*changes, ticks[-1]), logarithmic)
    high += 0.08 * (high - low)
    x_ticks = round_ticks(0.0, max(point.share for point in every) or 1.0)
    x_scale = (WIDTH - left - right) / x_ticks[-1]

    def y_of(change: float) -> float:
        share = (_height(change, logarithmic) - low) / (high - low) if math.isfinite(change) else 1.0
        return top + height * (1 - share)

    parts = [
        draw_text(0, 20, f"change of perplexity{', log scale' if logarithmic else ''}", faint=True),
        draw_text(WIDTH - right, top + height + 44, x_name, "end", faint=True),
    ]
    for tick in ticks:
        y = y_of(tick)
        percent = f"{tick * 100:+,.4g} %" if tick else "0 %"
        label = numbers.multiple(1 + tick) if logarithmic and tick > 1 else percent
        parts += [draw_line(left, y, WIDTH - right, y, 0.15), draw_text(left - 14, y + 4, label, "end", faint=True)]
    for tick in x_ticks:
        x = left + tick * x_scale
        parts += [
            draw_line(x, top, x, top + height, 0.08),
            draw_text(x, top + height + 22, f"{tick * 100:g} %", "middle", faint=True),
        ]
    spots = [(left + point.share * x_scale, y_of(point.change)) for point in every]
    for point, (x, y) in zip(every, spots, strict=True):
        parts.append(_mark(point, x, y, DENSE if point is every[0] else SPARSE, x_name))
    names = [point.label + ("" if math.isfinite(point.change) else " (inf)") for point in every]
    parts += label_spots(spots, names, top, top + height)
    return svg(title, "; ".join(_words(point, x_name) for point in every[1:]), top + height + 54, parts)


def _words(point: Point, x_name: str) -> str:
    return f"{point.label}: {x_name} {numbers.percent(point.share)}, perplexity {numbers.change(point.change)}"


def _mark(point: Point, x: float, y: float, colour: str, x_name: str) -> str:
    words = _words(point, x_name)
    if math.isfinite(point.change):
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour}"><title>{escape(words)}</title></circle>'
    return f'<path d="M{x - 6:.1f} {y + 6:.1f}h12l-6 -11z" fill="{colour}"><title>{escape(words)}</title></path>'


def label_spots(
    spots: Sequence[tuple[float, float]],
    names: Sequence[str],
    top: float,
    bottom: float,
    whiskers: Sequence[tuple[float, float]] = (),
) -> list[str]:
    """A label beside each spot, moved to the first place that is free, upwards first, with a line where it moved.

    `whiskers`, from left to right through each spot, are not free.
    """
    line = FONT + 3.0
    taken = [(x - 7, x + 7, y) for x, y in spots]
    taken += [(low, high, y) for (low, high), (_, y) in zip(whiskers, spots, strict=False)]
    parts = []
    for (x, y), name in sorted(zip(spots, names, strict=True), key=lambda item: -item[0][1]):
        text = cut(name, WIDTH / 3)
        side = -1 if x + 12 + len(text) * CHARACTER > WIDTH else 1
        start, end = sorted((x + side * 12, x + side * (12 + len(text) * CHARACTER)))
        beside = [other for left, right, other in taken if start < right and left < end]
        steps = [y - step * line / 4 for step in range(100)] + [y + step * line / 4 for step in range(100)]
        inside = (place for place in steps if top <= place <= bottom)
        place = next((place for place in inside if all(abs(place - other) >= line for other in beside)), y)
        taken.append((start, end, place))
        if place != y:
            parts.append(draw_line(x, y, x + side * 11, place, 0.4))
        parts.append(draw_text(x + side * 12, place + 4, text, "start" if side > 0 else "end"))
    return parts


def _bar(
    left: float, y: float, height: float, scale: float, values: Spread, paint: str, number: Callable[[float], str]
) -> str:
    words = numbers.spread(values, number)
    if not all(map(math.isfinite, (values.median, values.low, values.high))):
        return draw_text(left + 6, y + height - 4, words)
    low, high, middle = left + values.low * scale, left + values.high * scale, y + height / 2
    whisker = f"M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 4:.1f}v8M{high:.1f} {middle - 4:.1f}v8"
    return (
        f'<rect x="{left:.1f}" y="{y + 1:.1f}" width="{values.median * scale:.1f}" height="{height - 2:.1f}" rx="2" '
        f"{paint}><title>{escape(words)}</title></rect>"
        f'<path d="{whisker}" stroke="currentColor" stroke-width="1.5" fill="none"/>'
        + draw_text(high + 8, y + height - 4, number(values.median))
    )


def _paints(number: int) -> list[str]:
    """The SVG attributes that colour so many series."""
    dense, pale, sparse = f'fill="{DENSE}"', f'fill="{SPARSE}" fill-opacity="0.45"', f'fill="{SPARSE}"'
    return [dense, *[pale] * (number - 2), sparse][:number]


def _legend(paints: Mapping[str, str], left: float) -> str:
    parts, x = [], left
    for name, paint in paints.items():
        parts.append(f'<rect x="{x:.1f}" y="9" width="13" height="13" rx="2" {paint}/>')
        parts.append(draw_text(x + 19, 20, name))
        x += 40 + len(name) * CHARACTER
    return "".join(parts)


def _change_ticks(low: float, high: float) -> list[float]:
    """Zero, 1 %, 10 % and so on in both directions, and beyond +100 % the round multiples 10x, 100x and so on."""
    powers = [10.0**power - 1 for power in range(1, math.ceil(math.log10(max(1 + high, 10))) + 1)]
    above = [tick for tick in (0.01, 0.1, 1.0, *powers[:: math.ceil(len(powers) / 8)]) if tick <= high]
    return [*(tick for tick in (-0.1, -0.01) if tick >= low), 0.0, *above]


def _height(change: float, logarithmic: bool) -> float:
    return math.asinh(change / LINEAR_WITHIN) if logarithmic else change
