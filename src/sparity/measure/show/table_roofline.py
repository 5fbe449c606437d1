"""Rooflines in the terminal: what each processor could gain at most, and where there is no real speed."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparity.measure.data.roofline import Roof
from sparity.measure.show import numbers

WIDTH = 110
WORDS = (
    "The least times that memory and arithmetic allow, weights in bfloat16: real ones are longer, and a ratio of real "
    "ones is nearer to 1. GPUs by their data sheets; Sparity's engine runs on this machine."
)


def render_rooflines(found: Sequence[Roof]) -> Table:
    """A row per processor."""
    first = found[0]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("processor", overflow="fold")
    for name in (f"step at batch {first.batch}", "sparse", "gain", f"prompt of {first.prompt:,}", "sparse", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        cells = []
        for dense, sparse, gain in zip(one.dense, one.sparse, one.gains, strict=True):
            cells += [short(dense.seconds), short(sparse.seconds), f"{gain:.2f}x"]
        table.add_row(one.hardware.name, *cells)
    return table


def describe_roof(one: Roof) -> str:
    """Whether there is real speed, and why not, or not everywhere."""
    said = "could be faster" if one.real else "NO REAL SPEED HERE"
    return f"{one.hardware.name}: {said}" + (f"; {'; '.join(one.reasons)}." if one.reasons else ".")


def print_rooflines(found: Sequence[Roof], console: Console) -> None:
    """The table, then a sentence per processor; processors of which the same is said share one."""
    width = min(console.width, WIDTH)
    console.print(render_rooflines(found), width=width)
    together: dict[tuple[bool, tuple[str, ...]], list[Roof]] = {}
    for one in found:
        together.setdefault((one.real, one.reasons), []).append(one)
    for same in together.values():
        names = ", ".join(one.hardware.name for one in same)
        console.print(Text(describe_roof(same[0]).replace(same[0].hardware.name, names, 1)), width=width)
    console.print(Text(WORDS), width=width)


def short(seconds: float) -> str:
    """A time as "1.2 ms" or "35 µs"."""
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else numbers.seconds(seconds)
