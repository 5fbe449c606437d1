"""Numbers as text: the one place that decides digits and units for the table, the page and the model card."""

import math
from collections.abc import Callable
from typing import Any

import yaml

from sparity.measure.data.report import Spread

LARGEST_PERCENT = 10.0  # a change beyond +1000 % reads better as a multiple

FASTER, SLOWER = 1.10, 0.95  # two equal models timed on a busy machine stay between these


def percent(fraction: float) -> str:
    """A fraction as "50.2 %"."""
    return f"{fraction:z.1%}".replace("%", " %")


def shares(zeros: float, left: float | None, skipped: float | None) -> str:
    """Zeros, and on lines of their own what is left and what is skipped: "50.2 %", "75.0 % left", "39.8 % skipped"."""
    lines = [percent(zeros)]
    if left is not None:
        lines.append(f"{percent(left)} left")
    if skipped is not None:
        lines.append(f"{percent(skipped)} skipped")
    return "\n".join(lines)


def change(fraction: float) -> str:
    """A relative change as "+16.2 %", or as the multiple "124x" of the old value when it is very large."""
    if not math.isfinite(fraction):
        return str(fraction)
    if fraction < LARGEST_PERCENT:
        return f"{fraction:+z.1%}".replace("%", " %")
    return multiple(1 + fraction)


def multiple(value: float) -> str:
    """A multiple as "0.5x", "12.4x", "1,240x" or "7.7e7x"."""
    return f"{value:.3g}x" if value < 100 else f"{_short(value, 0)}x"


def ratio(value: float) -> str:
    """A speed ratio as "0.87x"."""
    return f"{value:.2f}x"


def perplexity(value: float) -> str:
    """Perplexity as "13.07", "1,620", "1.0e9" or "inf"."""
    return _short(value, 2)


def divergence(value: float) -> str:
    """A KL divergence in nats with four decimals."""
    return f"{value:.4f}" if value < 1000 else _short(value, 0)


def rate(value: float) -> str:
    """Tokens per second with three significant digits."""
    return _short(value, 2 if value < 10 else 1 if value < 100 else 0)


def seconds(value: float) -> str:
    """A duration as "8.5 ms", "850 ms", "12.3 s", "2 min 05 s" or "3 h 20 min"."""
    if value < 0.01:
        return f"{value * 1e3:.1f} ms"
    if value < 1:
        return f"{value * 1e3:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    if not math.isfinite(value):
        return f"{value} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes in decimal units: "512 B", "988.1 MB", "1.3 GB"."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def amount(count: int) -> str:
    """A number of things in words: "12,345", "494.0 million", "1.1 billion"."""
    if count < 1_000_000:
        return f"{count:,}"
    return f"{count / 1e6:.1f} million" if count < 999_950_000 else f"{count / 1e9:.1f} billion"


def bits(value: float) -> str:
    """Bits of a stored weight as "4 bits", "4.5 bits" or "1 bit"."""
    short = f"{value:.3g}"
    return f"{short} bit{'' if short == '1' else 's'}"


def spread(values: Spread, number: Callable[[float], str]) -> str:
    """The median with the lowest and the highest: "9.12 [8.80-9.40]"."""
    return f"{number(values.median)} [{number(values.low)}-{number(values.high)}]"


def direction(ratio_to_dense: Spread) -> str:
    """The word "faster" or "slower" when every round and a median well beyond the noise say so, else "on par"."""
    if ratio_to_dense.low > 1 and ratio_to_dense.median >= FASTER:
        return "faster"
    return "slower" if ratio_to_dense.high < 1 and ratio_to_dense.median <= SLOWER else "on par"


def speed_ratio(ratio_to_dense: Spread) -> str:
    """A speed ratio with its word: "0.87x, slower"."""
    return f"{ratio(ratio_to_dense.median)}, {direction(ratio_to_dense)}"


def recipe_yaml(recipe: dict[str, Any]) -> str:
    """A recipe as YAML, its keys in their own order."""
    text: str = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return text


def _short(value: float, decimals: int) -> str:
    if not math.isfinite(value):
        return str(value)
    if value < 1000:
        return f"{value:.{decimals}f}"
    if value < 1e6:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
