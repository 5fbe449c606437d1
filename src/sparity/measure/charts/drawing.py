"""What every chart is drawn with: inline SVG coloured by the page's CSS variables, with defaults of their own."""

import math
from collections.abc import Callable, Sequence

from sparity.measure.show import numbers
from sparity.visible import escape

WIDTH = 840
FONT = 13
CHARACTER = 0.56 * FONT  # a generous mean width of a sans-serif character
DENSE, SPARSE = "var(--dense, #8d939e)", "var(--sparse, #2f6fde)"
TICK_LABELS = 6


def svg(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    """The whole drawing, with its title and what it says in words."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="{FONT}" fill="currentColor">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def draw_text(x: float, y: float, text: str, anchor: str = "start", faint: bool = False, small: bool = False) -> str:
    """Text at a place; `anchor` says which of its ends lies there: start, middle or end."""
    look = ' fill-opacity="0.72"' if faint else ""
    look += f' font-size="{FONT - 2}"' if small else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{escape(text)}</text>'


def draw_line(x1: float, y1: float, x2: float, y2: float, opacity: float) -> str:
    """A thin line in the colour of the text."""
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="currentColor" stroke-opacity="{opacity}"/>'


def cut(text: str, width: float) -> str:
    """The text, shortened to what fits into a width."""
    most = int(width / CHARACTER)
    return text if len(text) <= most else text[: most - 1] + "…"


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers around the range, the last one not below `high`."""
    rough = (high - low) / (TICK_LABELS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def strength(value: float, scale: tuple[float, float]) -> float:
    """Opacity of a cell; it ends well below one so that text on it stays readable in light and dark."""
    low, high = scale
    share = (value - low) / (high - low) if high > low else 0.0
    return 0.07 + 0.6 * min(max(share, 0.0), 1.0)


def scale_legend(scale: tuple[float, float], number: Callable[[float], str] = numbers.percent) -> str:
    """The shades from the faintest to the strongest, in the upper right corner, with the numbers at both ends."""
    low, high = scale
    shades = [low + (high - low) * step / 8 for step in range(9)]
    x = WIDTH - 8 - 70 - len(shades) * 14
    swatches = "".join(
        f'<rect x="{x + number * 14:.1f}" y="9" width="14" height="14" fill="{SPARSE}" '
        f'fill-opacity="{strength(shade, scale):.2f}"/>'
        for number, shade in enumerate(shades)
    )
    return draw_text(x - 8, 21, number(low), "end") + swatches + draw_text(WIDTH - 70, 21, number(high))
