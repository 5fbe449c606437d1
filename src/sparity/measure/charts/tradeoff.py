"""Quality against speed: one mark per contender, and which of them another one beats in both."""

import math
from collections.abc import Sequence

from sparity.measure.charts.bars_and_maps import label_spots
from sparity.measure.charts.drawing import DENSE, SPARSE, WIDTH, draw_line, draw_text, svg
from sparity.measure.charts.lines_matrix import Scale, tick_words
from sparity.measure.data.report import Contestant
from sparity.measure.show import numbers
from sparity.visible import escape

LEFT, RIGHT, TOP, HEIGHT = 80.0, 30.0, 40.0, 340.0
PEER = "var(--peer, #c2410c)"
PAINTS = {"dense": DENSE, "sparse": SPARSE, "peer": PEER}


def dominated(contestants: Sequence[Contestant]) -> dict[str, str]:
    """Whoever another beats, and by whom: at least as fast and as good, and better in one of both.

    Speeds are compared by their medians; among several winners the fastest is named.
    """
    found = {}
    for one in contestants:
        winners = [other for other in contestants if _beats(other, one)]
        if winners:
            found[one.name] = max(winners, key=lambda other: other.rate.median).name
    return found


def tradeoff(title: str, contestants: Sequence[Contestant]) -> str:
    """Decode speed from left to right, perplexity downwards: the best are at the lower right; the beaten are hollow.

    The whiskers are the lowest and the highest speed of all rounds. Both axes are logarithmic where that reads better.
    """
    shown = [one for one in contestants if math.isfinite(one.perplexity)]
    beaten = dominated(contestants)
    rates = [value for one in shown for value in (one.rate.low, one.rate.high)]
    across = Scale.of_heights([0.0, *rates], LEFT, WIDTH - RIGHT)
    upward = Scale.of_heights([one.perplexity for one in shown], TOP + HEIGHT, TOP)
    parts = [
        draw_text(0, 20, "perplexity, lower is better" + (", log scale" if upward.logarithmic else ""), faint=True),
        draw_text(WIDTH - RIGHT, TOP + HEIGHT + 44, "tokens/s, more is better", "end", True),
    ]
    for tick in upward.ticks:
        y = upward.place(tick)
        parts += [
            draw_line(LEFT, y, WIDTH - RIGHT, y, 0.15),
            draw_text(LEFT - 14, y + 4, tick_words(tick), "end", True),
        ]
    for tick in across.ticks:
        x = across.place(tick)
        parts += [
            draw_line(x, TOP, x, TOP + HEIGHT, 0.08),
            draw_text(x, TOP + HEIGHT + 22, tick_words(tick), "middle", faint=True),
        ]
    spots = [(across.place(one.rate.median), upward.place(one.perplexity)) for one in shown]
    whiskers = [(across.place(one.rate.low), across.place(one.rate.high)) for one in shown]
    for one, (x, y), (low, high) in zip(shown, spots, whiskers, strict=True):
        paint = PAINTS[one.kind]
        fill = "var(--page, #ffffff)" if one.name in beaten else paint
        parts.append(
            f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="{paint}" stroke-opacity="0.5" stroke-width="2"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{fill}" stroke="{paint}" stroke-width="2">'
            f"<title>{escape(_words(one, beaten))}</title></circle>"
        )
    parts += label_spots(spots, [one.name for one in shown], TOP, TOP + HEIGHT, whiskers)
    return svg(title, "; ".join(_words(one, beaten) for one in contestants), TOP + HEIGHT + 54, parts)


def _beats(other: Contestant, one: Contestant) -> bool:
    fast, good = other.rate.median >= one.rate.median, other.perplexity <= one.perplexity
    return fast and good and (other.rate.median > one.rate.median or other.perplexity < one.perplexity)


def _words(one: Contestant, beaten: dict[str, str]) -> str:
    words = f"{one.name}: perplexity {numbers.perplexity(one.perplexity)}, {numbers.spread(one.rate, numbers.rate)}"
    return words + (f", beaten by {beaten[one.name]}" if one.name in beaten else "")
