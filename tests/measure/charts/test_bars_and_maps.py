import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from sparity.measure.charts.bars_and_maps import CHARACTER, WIDTH, BarGroup, Point, grouped_bars, heat_map, scatter
from sparity.measure.data.report import Spread
from sparity.measure.show import numbers

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '"><script>&'


def parse(drawing):
    return ElementTree.fromstring(drawing)


def texts(drawing):
    return {element.text: element for element in parse(drawing).iter(f"{SVG}text")}


def marks(drawing, tag="circle"):
    """Shapes of a scatter by the name in their tooltip."""
    shapes = (shape for shape in parse(drawing).iter(SVG + tag) if shape.find(f"{SVG}title") is not None)
    return {shape.find(f"{SVG}title").text.partition(":")[0]: shape for shape in shapes}


def height_of(drawing, name):
    return float(marks(drawing)[name].get("cy"))


BARS = [BarGroup("wanda", {"dense": Spread(10, 9, 11), "sparse": Spread(5, 4, 7)}, "0.50x, slower")]


@pytest.mark.parametrize(
    "drawing",
    [
        grouped_bars(
            f"Speed {HOSTILE}", [BarGroup(HOSTILE, {HOSTILE: Spread(1, 1, 1)}, HOSTILE)], HOSTILE, numbers.rate
        ),
        heat_map(f"Sparsity {HOSTILE}", {(0, HOSTILE): 0.5}, 1, (0.4, 0.6)),
        scatter(f"Quality {HOSTILE}", [Point(HOSTILE, 0.5, 0.1)]),
    ],
)
def test_drawings_are_well_formed_named_and_escaped(drawing):
    root = parse(drawing)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert HOSTILE in root.find(f"{SVG}title").text
    assert root.find(f"{SVG}desc").text
    assert "<script>" not in drawing
    assert "#" not in re.sub(r"var\(--\w+, #\w+\)", "", drawing)  # every colour follows the page


def test_bars_reach_to_the_median_and_whiskers_from_lowest_to_highest():
    root = parse(grouped_bars("Speed", BARS, "tokens/s", numbers.rate))
    dense, sparse = (r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None)
    assert float(dense.get("width")) == pytest.approx(2 * float(sparse.get("width")), abs=0.2)
    assert dense.find(f"{SVG}title").text == "10.0 [9.00-11.0]"
    assert "--dense" in dense.get("fill")
    assert "--sparse" in sparse.get("fill")
    per_unit = float(dense.get("width")) / 10
    for whisker, bar, (low, high) in zip(root.iter(f"{SVG}path"), (dense, sparse), ((9, 11), (4, 7)), strict=True):
        start, end = map(float, re.match(r"M([\d.]+) [\d.]+H([\d.]+)", whisker.get("d")).groups())
        left = float(bar.get("x"))
        assert (start - left, end - left) == pytest.approx((low * per_unit, high * per_unit), abs=0.2)


def test_bars_show_value_label_note_unit_and_description():
    drawing = grouped_bars("Speed", BARS, "tokens/s", numbers.rate)
    assert {"10.0", "5.00", "wanda", "0.50x, slower", "tokens/s", "dense", "sparse"} <= set(texts(drawing))
    assert parse(drawing).find(f"{SVG}desc").text == "wanda, dense: 10.0 [9.00-11.0]; wanda, sparse: 5.00 [4.00-7.00]"


def test_bars_write_a_value_that_is_not_finite():
    inf = Spread(math.inf, 1.0, math.inf)
    drawing = grouped_bars("Speed", [BarGroup("x", {"dense": Spread(1, 1, 1), "sparse": inf})], "s", numbers.rate)
    assert "inf [1.00-inf]" in texts(drawing)


def test_heat_map_colours_by_value_within_the_scale():
    cells = {(0, "q"): 0.4, (1, "q"): 0.5, (1, "down"): 0.6, (2, "q"): 0.9}
    drawing = heat_map("Sparsity", cells, 3, (0.4, 0.6))
    found = marks(drawing, "rect")
    opacity = {shape.find(f"{SVG}title").text: float(shape.get("fill-opacity")) for shape in found.values()}
    assert opacity == {
        "block 0, q: 40.0 %": 0.07,
        "block 1, q: 50.0 %": 0.37,
        "block 1, down: 60.0 %": 0.67,
        "block 2, q: 90.0 %": 0.67,
    }
    assert parse(drawing).find(f"{SVG}desc").text == "2 roles in 3 blocks, from 40.0 % to 90.0 %"
    assert {"q", "down", "0", "1", "2", "40.0 %", "60.0 %", "50.0"} <= set(texts(drawing))


@pytest.mark.parametrize("blocks", [1, 24, 80, 400])
def test_heat_map_fits_its_width_and_its_block_numbers_do_not_touch(blocks):
    drawing = heat_map("Sparsity", {(block, "q"): 0.5 for block in range(blocks)}, blocks, (0.45, 0.55))
    cells = marks(drawing, "rect")
    assert len(cells) == blocks
    assert max(float(cell.get("x")) + float(cell.get("width")) for cell in cells.values()) <= WIDTH
    places = [float(element.get("x")) for text, element in texts(drawing).items() if text.isdigit()]
    assert len(places) >= min(blocks, 4)
    assert all(right - left >= 25 for left, right in pairwise(places))


def test_scatter_is_linear_for_changes_of_one_size():
    drawing = scatter("Quality", [Point("a", 0.5, 0.05), Point("b", 0.25, 0.10)])
    zero, a, b = (height_of(drawing, name) for name in ("dense", "a", "b"))
    assert zero - b == pytest.approx(2 * (zero - a), abs=0.2)
    across = {name: float(shape.get("cx")) for name, shape in marks(drawing).items()}
    assert across["a"] - across["dense"] == pytest.approx(2 * (across["b"] - across["dense"]), abs=0.2)
    assert "change of perplexity" in texts(drawing)
    assert {"0 %", "+2 %", "+10 %"} <= set(texts(drawing))


def test_scatter_is_logarithmic_for_changes_far_apart():
    drawing = scatter("Quality", [Point("a", 0.5, 0.1), Point("b", 0.5, 10.0), Point("c", 0.5, 1e3)])
    a, b, c = (height_of(drawing, name) for name in "abc")
    assert "change of perplexity, log scale" in texts(drawing)
    assert {"0 %", "+1 %", "+10 %", "+100 %", "10x", "100x", "1,000x"} <= set(texts(drawing))
    assert a - b == pytest.approx(b - c, rel=0.01)  # a factor of a hundred each


def test_scatter_draws_an_improvement_below_dense():
    drawing = scatter("Quality", [Point("better", 0.5, -0.02), Point("worse", 0.5, 0.02)])
    assert height_of(drawing, "better") > height_of(drawing, "dense") > height_of(drawing, "worse")


def test_scatter_puts_infinity_on_the_upper_edge_and_leaves_nan_out():
    points = [Point("broken", 0.5, math.inf), Point("lost", 0.5, math.nan), Point("fine", 0.5, 0.1)]
    drawing = scatter("Quality", points)
    assert list(marks(drawing, "path")) == ["broken"]
    assert list(marks(drawing)) == ["dense", "fine"]
    assert "broken (inf)" in texts(drawing)
    assert float(texts(drawing)["broken (inf)"].get("y")) < height_of(drawing, "fine")
    assert "lost" not in drawing


@pytest.mark.parametrize("changes", [[0.1] * 7, [math.inf] * 7, [0.0] * 7, [0.1, 0.11, 0.12, 0.13, 2.4, 9.0, 1e9]])
@pytest.mark.parametrize("name", ["wanda", "a name so long that it has to be cut somewhere before its end"])
def test_scatter_labels_neither_overlap_nor_leave_the_drawing(changes, name):
    drawing = scatter("Quality", [Point(f"{number} {name}", 0.5, change) for number, change in enumerate(changes)])
    _, _, width, height = map(float, parse(drawing).get("viewBox").split())
    boxes = []
    for text, element in texts(drawing).items():
        if name[:5] in text:
            x, y, wide = float(element.get("x")), float(element.get("y")), len(text) * CHARACTER
            left = x if element.get("text-anchor") == "start" else x - wide
            assert left >= 0
            assert left + wide <= width
            assert 0 < y <= height
            boxes.append(y)
    assert len(boxes) == 7
    assert all(lower - upper >= 13 for upper, lower in pairwise(sorted(boxes)))
