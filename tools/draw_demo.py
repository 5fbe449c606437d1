"""Draw the picture of the README from the report of `sparity demo`.

    sparity demo --bundled -o demo-out
    python tools/draw_demo.py demo-out/report.json docs/pictures/demo.svg

The charts are those of the report's page, here one below the other in a single file, with colours for light and dark.
"""

import json
import sys
from pathlib import Path

from sparity.errors import InvalidInput
from sparity.measure.charts.bars_and_maps import BarGroup, grouped_bars
from sparity.measure.charts.picture import picture
from sparity.measure.charts.tradeoff import tradeoff
from sparity.measure.data.report import Contestant, Spread
from sparity.measure.show import numbers


def draw(report):
    """The SVG of a report as plain data: perplexity of every candidate, decode speed of the larger model."""
    charts = [*quality_charts(report), *speed_charts(report), *race_charts(report)]
    if not charts:
        raise InvalidInput("the report has no quality and no speed to draw: take the report.json of `sparity demo`")
    return picture(charts)


def quality_charts(report):
    """Perplexity on the first text: dense, then every candidate."""
    measured = [(candidate, candidate["quality"][0]) for candidate in report["candidates"] if candidate["quality"]]
    if not measured:
        return []
    first = measured[0][1]
    groups = [BarGroup("dense", {"dense": exact(first["dense_perplexity"])})]
    for candidate, item in measured:
        note = f"{numbers.change(item['change'])} perplexity"
        groups.append(BarGroup(candidate["name"], {"sparse": exact(item["perplexity"])}, note))
    title = f"{report['model']}: perplexity on {first['text']}, lower is better"
    return [(title, grouped_bars(title, groups, "perplexity", numbers.perplexity))]


def speed_charts(report):
    """Decode speed of the larger random model: in transformers, dense on the engine, and sparse."""
    larger = report["larger"]
    if larger is None or larger["speed"] is None:
        return []
    speed = larger["speed"]
    groups = [BarGroup("dense, in transformers", {"dense": spread(speed["dense"])})]
    if speed["engine_dense"]:
        groups.append(BarGroup("dense, on the engine", {"dense": spread(speed["engine_dense"]["pace"])}))
    note = numbers.size(larger["bytes_sparse"]) + " instead of " + numbers.size(larger["bytes_dense"])
    packed = f"{numbers.percent(larger['sparsity'])} sparse, packed"
    groups.append(BarGroup(packed, {"sparse": spread(speed["sparse"])}, note))
    millions = larger["parameters"] / 1e6
    title = f"A random model of {millions:.0f} million parameters: decode speed, higher is better"
    return [(title, grouped_bars(title, groups, "tokens/s", numbers.rate))]


def race_charts(report):
    """Of the demo on a real model: quality against speed."""
    field = [
        Contestant(one["name"], Spread(**one["rate"]), float(one["perplexity"]), one["kind"])
        for one in report.get("contestants", ())
    ]
    title = f"{report['model']}: quality against decode speed, the best at the lower right"
    return [(title, tradeoff(title, field))] if field else []


def exact(value):
    """A single number as what the charts draw."""
    return Spread(value, value, value)


def spread(pace):
    """The decode speed of a pace as what the charts draw."""
    return Spread(**pace["decode"])


def main(source, target):
    """Read the report and write the picture."""
    Path(target).write_text(draw(json.loads(Path(source).read_text())))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
