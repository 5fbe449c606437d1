"""Charts as a file of their own, with colours for light and dark."""

import re
from collections.abc import Sequence

from sparity.measure.charts.drawing import WIDTH, draw_text

MARGIN, TITLE = 20, 44  # around the charts, and the height of a chart's title
STYLE = (
    "<style>svg{color:#1c1e22;--page:#ffffff;--dense:#8d939e;--sparse:#2f6fde}"
    "@media (prefers-color-scheme:dark){svg{color:#e8e9eb;--page:#0d1117;--dense:#7f8794;--sparse:#6ea2ff}}</style>"
)


def picture(charts: Sequence[tuple[str, str]]) -> str:
    """One SVG file of titles and charts, as the functions of this package draw them, one below the other."""
    parts, y = [], MARGIN
    for title, chart in charts:
        found = re.match(r'<svg [^>]*viewBox="0 0 \d+ (\d+)"', chart)
        height = int(found[1]) if found else 0
        parts.append(f'<g font-size="16" font-weight="600">{draw_text(MARGIN, y + 16, title)}</g>')
        parts.append(chart.replace("<svg ", f'<svg x="{MARGIN}" y="{y + TITLE}" width="{WIDTH}" height="{height}" ', 1))
        y += TITLE + height + MARGIN
    width = WIDTH + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" font-family="system-ui, sans-serif" '
        f'fill="currentColor">{STYLE}<rect width="{width}" height="{y}" rx="8" fill="var(--page)"/>'
        f"{''.join(parts)}</svg>\n"
    )
