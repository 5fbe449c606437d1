"""The frame of a page: self-contained, no script, nothing fetched, light and dark."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from sparity.measure.show import sentences
from sparity.visible import escape


def page(title: str, sections: Iterable[str], machine: Mapping[str, Any]) -> str:
    """A whole page of sections, with the machine's facts at its end; it needs nothing else."""
    style = resources.files("sparity.measure.show").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(sections)}{_footer(machine)}</main></body></html>\n"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], dense_first: bool = False, labels: int = 1) -> str:
    """A table whose heads are text and whose cells are HTML; the first `labels` columns hold words."""
    look = ["" if not 0 < column < labels else ' class="label"' for column in range(len(heads))]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(look, heads, strict=True))
    lines = ["".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(look, row, strict=True)) for row in rows]
    opening = ['<tr class="dense">' if dense_first and not place else "<tr>" for place in range(len(lines))]
    body = "".join(f"{start}{line}</tr>" for start, line in zip(opening, lines, strict=True))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def column_table(columns: Sequence[tuple[str, Sequence[str]]], dense_first: bool = False, labels: int = 1) -> str:
    """The same from columns, each with its head and its cells; at least one."""
    heads, cells = zip(*columns, strict=True)
    return table(heads, zip(*cells, strict=True), dense_first, labels)


def figure(caption: str, drawing: str) -> str:
    """A drawing under its caption."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


def details(summary: str, body: str) -> str:
    """HTML that is folded away behind a line of text."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _footer(machine: Mapping[str, Any]) -> str:
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in sentences.describe_machine(machine)
    )
    return f"<footer><h2>Machine and versions</h2><dl>{facts}</dl></footer>"
