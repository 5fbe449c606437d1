"""Line plots and the matrix of a sweep, as inline SVG like the other charts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sparity.measure.charts.bars_and_maps import LOG_BEYOND
from sparity.measure.charts.drawing import (
    CHARACTER,
    DENSE,
    FONT,
    SPARSE,
    TICK_LABELS,
    WIDTH,
    cut,
    draw_line,
    draw_text,
    round_ticks,
    scale_legend,
    strength,
    svg,
)
from sparity.visible import escape

COLOURS = tuple(
    f"var(--line-{number}, {colour})"
    for number, colour in enumerate(
        ("#2f6fde", "#c2410c", "#0b7a4b", "#9333a8", "#946200", "#0e7490", "#be185d", "#59616e"), 1
    )
)
DASHES = ("", "7 4", "2 4")  # a colour's second and third use
LEFT, RIGHT, TOP, HEIGHT = 80.0, 210.0, 40.0, 320.0
WIDEST = 330.0  # the room on the right when names are long
BESIDE = 36.0  # from the plot to a name
ROW = FONT + 4.0  # of the lines' names
DECADES = 6  # a logarithmic axis shows no more; what is smaller lies on its lower edge
NARROWEST = 26.0  # the room of a label of the x axis


@dataclass(frozen=True)
class Line:
    """One line: its values by x. NaN and a missing x leave a gap, infinity is a triangle on the upper edge."""

    name: str
    points: Mapping[float, float]


def line_plot(
    title: str,
    lines: Sequence[Line],
    x_name: str,
    y_name: str,
    number: Callable[[float], str],
    level: tuple[str, float] | None = None,
) -> str:
    """Lines over a numeric axis, each named at its right end; both axes are logarithmic where that reads better.

    Args:
        title: what is drawn.
        lines: in the order of their colours.
        x_name: what the x axis is.
        y_name: what the y axis is.
        number: writes values of the y axis.
        level: the name and height of a horizontal line to compare with.
    """
    longest = max((len(line.name) for line in lines), default=0) + 1
    edge = WIDTH - min(max(BESIDE + longest * CHARACTER, RIGHT), WIDEST)
    xs = sorted({x for line in lines for x in line.points})
    values = [y for line in lines for y in line.points.values() if math.isfinite(y)] + ([level[1]] if level else [])
    height = max(HEIGHT, ROW * (len(lines) + 1))
    across = Scale.of_values(xs, LEFT, edge)
    upward = Scale.of_heights(values, TOP + height, TOP)
    parts = [
        draw_text(0, 20, y_name + (", log scale" if upward.logarithmic else ""), faint=True),
        draw_text(edge, TOP + height + 44, x_name + (", log scale" if across.logarithmic else ""), "end", True),
    ]
    for tick in upward.ticks:
        y = upward.place(tick)
        parts += [
            draw_line(LEFT - 8, y, edge, y, 0.15),
            draw_text(LEFT - 16, y + 4, tick_words(tick), "end", True),
        ]
    last = -math.inf
    for x in xs:
        place = across.place(x)
        parts.append(draw_line(place, TOP, place, TOP + height, 0.08))
        word = _short(x)
        half = max(NARROWEST, (len(word) + 1) * CHARACTER) / 2
        if place - half >= last:
            parts.append(draw_text(place, TOP + height + 22, word, "middle", faint=True))
            last = place + half
    names: list[tuple[float, float, str, str]] = []
    if level:
        y = upward.place(level[1])
        look = f'stroke="{DENSE}" stroke-width="1.5" stroke-dasharray="4 4"'
        words = f"<title>{escape(f'{level[0]}: {number(level[1])}')}</title>"
        parts.append(f'<path d="M{LEFT:.1f} {y:.1f}H{edge:.1f}" {look}>{words}</path>')
        names.append((edge, y, level[0], DENSE))
    for place_in_order, line in enumerate(lines):
        colour = COLOURS[place_in_order % len(COLOURS)]
        dash = DASHES[place_in_order // len(COLOURS) % len(DASHES)]
        spots = {x: (across.place(x), upward.place(line.points[x])) for x in xs if not _missing(line, x)}
        parts += _path(line, xs, spots, colour, dash)
        parts += [_mark(line, x, spots[x], x_name, number, colour) for x in spots]
        if spots and line.name:
            names.append((*spots[max(spots)], line.name, colour))
    parts += _names(names, edge, TOP, TOP + height)
    said = "; ".join(
        f"{line.name or y_name}: " + ", ".join(f"{number(y)} at {x:g}" for x, y in sorted(line.points.items()))
        for line in lines
    )
    return svg(title, said, TOP + height + 54, parts)


def _short(x: float) -> str:
    """A place on the x axis; of many digits the first three."""
    word = f"{x:g}"
    return f"{x:.3g}" if "." in word and len(word) > 5 else word


def matrix_chart(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], float],
    number: Callable[[float], str],
) -> str:
    """A table coloured by value, from the smallest to the largest; the smallest of each column has a frame.

    Args:
        title: what the values are.
        rows: the names of the rows.
        columns: the names of the columns.
        cells: value by row and column; cells that are missing stay empty.
        number: writes a value.
    """
    left, top, height = 230.0, 66.0, 38.0
    width = min((WIDTH - left - 8) / max(len(columns), 1), 180.0)
    shown = {place: math.log1p(value) for place, value in cells.items() if math.isfinite(value) and value > -1}
    scale = (min(shown.values(), default=0.0), max(shown.values(), default=1.0))
    parts = [scale_legend(scale, lambda value: number(math.expm1(value)))]
    for column, name in enumerate(columns):
        parts.append(draw_text(left + (column + 0.5) * width - 1, top - 12, cut(name, width), "middle", faint=True))
        best = min((shown[place] for place in shown if place[1] == column), default=None)
        for row in range(len(rows)):
            if (row, column) in cells:
                frame = shown.get((row, column)) == best is not None
                parts += _cell(left + column * width, top + row * height, width, height, shown.get((row, column)),
                               scale, f"{rows[row]}, {name}", number(cells[row, column]), frame)  # fmt: skip
    for row, name in enumerate(rows):
        parts.append(draw_text(left - 14, top + row * height + 23, cut(name, left - 20), "end"))
    said = "; ".join(f"{rows[row]}, {columns[column]}: {number(value)}" for (row, column), value in cells.items())
    return svg(title, said, top + len(rows) * height + 8, parts)


@dataclass(frozen=True)
class Scale:
    """From values to places in the drawing, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool
    ticks: tuple[float, ...] = ()

    @classmethod
    def of_values(cls, values: Sequence[float], start: float, end: float) -> "Scale":
        """From the first to the last value; logarithmic where that sets close values much further apart."""
        logarithmic = len(values) > 2 and values[0] > 0 and values[-1] > LOG_BEYOND * values[0]
        logarithmic = logarithmic and _narrowest([math.log(x) for x in values]) > 5 * _narrowest(values)
        return cls(values[0], values[-1], start, end, logarithmic) if values else cls(0, 1, start, end, False)

    @classmethod
    def of_heights(cls, values: Sequence[float], start: float, end: float) -> "Scale":
        """Around the values, with round ticks; logarithmic when they lie far apart."""
        positive = [value for value in values if value > 0]
        if positive and max(positive) > LOG_BEYOND * min(positive) and min(values) >= 0:
            every = _log_ticks(max(min(positive), max(positive) / 10**DECADES), max(positive))
            tens = tuple(tick for tick in every if f"{tick:e}".startswith("1.000000e"))
            return cls(every[0], every[-1], start, end, True, every if len(every) <= TICK_LABELS + 2 else tens)
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if high - low < 1e-9 * max(abs(high), 1e-9):
            low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
        ticks = tuple(round_ticks(low, high))
        return cls(min(low, ticks[0]), ticks[-1], start, end, False, ticks)

    def place(self, value: float) -> float:
        """Where a value lies; one beyond the ends lies on the end."""
        if self.high == self.low:
            return (self.start + self.end) / 2
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _narrowest(values: Sequence[float]) -> float:
    """The smallest distance of neighbours as a share of the whole."""
    return min(b - a for a, b in pairwise(values)) / (values[-1] - values[0])


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """1, 2 and 5 times the powers of ten, the first not above the range and the last not below it."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    first = max(tick for tick in every if tick <= low * (1 + 1e-9))
    last = min(tick for tick in every if tick >= high * (1 - 1e-9))
    return tuple(tick for tick in every if first <= tick <= last)


def _missing(line: Line, x: float) -> bool:
    return math.isnan(line.points.get(x, math.nan))


def tick_words(tick: float) -> str:
    """A tick as the axes write it."""
    return f"{tick:,.10g}" if tick == 0 or 1e-4 <= abs(tick) < 1e6 else f"{tick:.3g}"


def _path(
    line: Line, xs: Sequence[float], spots: Mapping[float, tuple[float, float]], colour: str, dash: str
) -> list[str]:
    """The strokes between neighbouring points that are both there and finite."""
    drawn, pen = "", False
    for x in xs:
        if x not in spots or not math.isfinite(line.points[x]):
            pen = False
            continue
        drawn += f"{'L' if pen else 'M'}{spots[x][0]:.1f} {spots[x][1]:.1f}"
        pen = True
    look = f' stroke-dasharray="{dash}"' if dash else ""
    return [f'<path d="{drawn}" stroke="{colour}" stroke-width="2" fill="none"{look}/>'] if "L" in drawn else []


def _mark(
    line: Line, x: float, spot: tuple[float, float], x_name: str, number: Callable[[float], str], colour: str
) -> str:
    value = line.points[x]
    words = f"<title>{escape(f'{line.name}, {x_name} {x:g}: {number(value)}'.removeprefix(', '))}</title>"
    if math.isfinite(value):
        return f'<circle cx="{spot[0]:.1f}" cy="{spot[1]:.1f}" r="4" fill="{colour}">{words}</circle>'
    return f'<path d="M{spot[0] - 6:.1f} {spot[1] + 6:.1f}h12l-6 -11z" fill="{colour}">{words}</path>'


def _names(names: Sequence[tuple[float, float, str, str]], edge: float, top: float, bottom: float) -> list[str]:
    """The names right of the plot, each as near to its line's end as the others allow, with a swatch and a leader."""
    ordered = sorted(names, key=lambda item: item[1])
    places: list[float] = []
    for _, y, _, _ in ordered:
        places.append(max(y, places[-1] + ROW) if places else max(y, top))
    limit = bottom
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - ROW
    parts = []
    for (x, y, name, colour), place in zip(ordered, places, strict=True):
        parts.append(f'<path d="M{x + 6:.1f} {y:.1f}L{edge + 22:.1f} {place:.1f}" stroke="{colour}" '
                     'stroke-opacity="0.45" fill="none"/>')  # fmt: skip
        parts.append(f'<circle cx="{edge + 26:.1f}" cy="{place:.1f}" r="4" fill="{colour}"/>')
        parts.append(draw_text(edge + BESIDE, place + 4, cut(name, WIDTH - edge - BESIDE)))
    return parts


def _cell(
    x: float, y: float, width: float, height: float, value: float | None, scale: tuple[float, float], name: str,
    words: str, frame: bool,
) -> list[str]:  # fmt: skip
    opacity = strength(scale[1] if value is None else value, scale)
    edge = ' stroke="currentColor" stroke-width="1.5"' if frame else ""
    about = f"<title>{escape(f'{name}: {words}')}</title>"
    return [
        f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 4:.1f}" height="{height - 4:.1f}" rx="3" '
        f'fill="{SPARSE}" fill-opacity="{opacity:.2f}"{edge}>{about}</rect>',
        draw_text(x + width / 2 - 1, y + height / 2 + 4, cut(words, width + CHARACTER), "middle"),
    ]
