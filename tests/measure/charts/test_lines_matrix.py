"""Line plots and matrices: where everything lies, worked out by hand."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from sparity.measure.charts.lines_matrix import HEIGHT, LEFT, RIGHT, TOP, Line, line_plot, matrix_chart
from sparity.measure.show import numbers

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '"><script>&'
EDGE = 840 - RIGHT  # 630; the plot is 550 wide and 320 high


def plot(*lines, level=None):
    drawn = [Line(name, points) for name, points in lines]
    return line_plot("Plot", drawn, "sparsity", "perplexity", lambda y: f"{y:g}", level)


def texts(drawing):
    return {element.text: element for element in ElementTree.fromstring(drawing).iter(f"{SVG}text")}


def marks(drawing, tag="circle"):
    """The place of every mark by its tooltip."""
    found = {}
    for shape in ElementTree.fromstring(drawing).iter(SVG + tag):
        title = shape.find(f"{SVG}title")
        if title is not None and tag == "circle":
            found[title.text] = (float(shape.get("cx")), float(shape.get("cy")))
        elif title is not None:
            found[title.text] = shape.get("d")
    return found


def strokes(drawing):
    """The course of every line that is drawn in full width."""
    return [
        shape.get("d")
        for shape in ElementTree.fromstring(drawing).iter(f"{SVG}path")
        if shape.get("stroke-width") == "2"
    ]


def test_linear_axes():
    drawing = plot(("a", {0.5: 20.0, 0.3: 10.0, 0.9: 12.0}))
    assert (LEFT, EDGE, TOP, HEIGHT) == (80, 630, 40, 320)
    assert marks(drawing) == {
        "a, sparsity 0.3: 10": (80.0, 360.0),
        "a, sparsity 0.5: 20": (pytest.approx(80 + 550 / 3, abs=0.05), 40.0),
        "a, sparsity 0.9: 12": (630.0, 296.0),  # 360 - 0.2 * 320
    }
    assert strokes(drawing) == ["M80.0 360.0L263.3 40.0L630.0 296.0"]
    assert {"perplexity", "sparsity", "10", "12", "14", "20", "0.3", "0.5", "0.9", "a"} <= set(texts(drawing))
    said = ElementTree.fromstring(drawing).find(f"{SVG}desc").text
    assert said == "a: 10 at 0.3, 20 at 0.5, 12 at 0.9"


def test_the_y_axis_is_logarithmic_when_values_lie_far_apart():
    drawing = plot(("a", {0.3: 10.0, 0.5: 100.0, 0.9: 1000.0}))
    assert [y for _, y in marks(drawing).values()] == [360.0, 200.0, 40.0]
    assert {"perplexity, log scale", "10", "100", "1,000", "500"} <= set(texts(drawing))
    wide = plot(("a", {0.3: 30.0, 0.9: 3e5}))  # 20 to 500,000: only the powers of ten are labelled
    assert {"100", "1,000", "10,000", "100,000"} <= set(texts(wide))
    assert not {"20", "500,000", "200"} & set(texts(wide))
    share = math.log(30 / 20) / math.log(500_000 / 20)
    assert marks(wide)["a, sparsity 0.3: 30"][1] == pytest.approx(360 - 320 * share, abs=0.05)


def test_the_x_axis_is_logarithmic_when_that_keeps_values_apart():
    drawing = plot(("a", {1: 1.0, 16: 2.0, 256: 3.0}))
    assert [x for x, _ in marks(drawing).values()] == [80.0, 355.0, 630.0]
    assert "sparsity, log scale" in texts(drawing)
    assert "sparsity" in texts(plot(("a", {0.05: 1.0, 0.3: 1.5, 0.6: 2.0, 0.9: 3.0})))


def test_a_level_is_drawn_across_and_counts_for_the_axis():
    drawing = plot(("a", {0: 12.0, 1: 20.0}), level=("dense", 10.0))
    assert marks(drawing, "path") == {"dense: 10": "M80.0 360.0H630.0"}
    assert marks(drawing)["a, sparsity 0: 12"] == (80.0, 296.0)
    assert "dense" in texts(drawing)


def test_a_gap_breaks_the_line_and_infinity_is_a_triangle_on_the_edge():
    drawing = plot(("a", {1: 1.0, 2: math.nan, 3: 1.0, 4: 2.0, 5: math.inf}), ("b", {1: 1.5, 5: 1.5}))
    assert strokes(drawing) == ["M80.0 360.0M355.0 360.0L492.5 40.0"]
    assert marks(drawing, "path") == {"a, sparsity 5: inf": "M624.0 46.0h12l-6 -11z"}
    assert [name for name in marks(drawing) if name.startswith("a,")] == [
        "a, sparsity 1: 1", "a, sparsity 3: 1", "a, sparsity 4: 2",
    ]  # fmt: skip
    assert "nan" not in re.sub(r"<desc>.*</desc>", "", drawing)


def test_zeros_lie_on_the_lower_edge_of_a_logarithmic_axis():
    drawing = plot(("a", {0: 0.0, 1: 0.001, 2: 10.0}))
    assert marks(drawing)["a, sparsity 0: 0"] == (80.0, 360.0)
    assert marks(drawing)["a, sparsity 1: 0.001"][1] == 360.0
    far = plot(("a", {0: 1e-12, 1: 10.0}))
    assert "1e-05" in texts(far)  # six decades below the largest
    assert marks(far)["a, sparsity 0: 1e-12"][1] == 360.0


@pytest.mark.parametrize(
    "points", [{0.5: 10.0}, {0.5: 0.0}, {}, {0.3: 7.0, 0.9: 7.0}, {0.3: math.inf}, {0.3: math.nan}]
)
def test_too_little_for_an_axis_is_drawn_all_the_same(points):
    drawing = plot(("a", points))
    for x, y in marks(drawing).values():
        assert LEFT <= x <= EDGE
        assert TOP <= y <= TOP + HEIGHT
    assert "nan" not in re.sub(r"<desc>.*</desc>", "", drawing)


@pytest.mark.parametrize("count", [1, 8, 30])
def test_the_names_do_not_touch_and_stay_inside(count):
    drawing = plot(
        *((f"line {number} with a name so long that it is cut", {0: 1.0, 1: 2.0}) for number in range(count))
    )
    _, _, width, height = map(float, ElementTree.fromstring(drawing).get("viewBox").split())
    names = [
        element for element in ElementTree.fromstring(drawing).iter(f"{SVG}text") if element.text.startswith("line")
    ]
    places = sorted(float(element.get("y")) for element in names)
    assert len(places) == count
    assert all(lower - upper >= 13 for upper, lower in pairwise(places))
    assert places[0] > 0
    assert places[-1] < height
    assert all(float(e.get("x")) + len(e.text) * 0.56 * 13 <= width for e in names)
    paths = [path for path in ElementTree.fromstring(drawing).iter(f"{SVG}path") if path.get("stroke-width") == "2"]
    looks = {(path.get("stroke"), path.get("stroke-dasharray")) for path in paths}
    assert len(looks) == min(count, 24)


def test_the_matrix_is_coloured_from_the_smallest_to_the_largest():
    cells = {(0, 0): 0.0, (0, 1): math.e - 1, (1, 0): math.e**2 - 1, (1, 1): math.inf}
    drawing = matrix_chart("Change", ["docs", "code"], ["a", "b"], cells, numbers.change)
    shapes = [s for s in ElementTree.fromstring(drawing).iter(f"{SVG}rect") if s.find(f"{SVG}title") is not None]
    assert [(s.find(f"{SVG}title").text, s.get("fill-opacity"), s.get("stroke")) for s in shapes] == [
        ("docs, a: +0.0 %", "0.07", "currentColor"),
        ("code, a: +638.9 %", "0.67", None),
        ("docs, b: +171.8 %", "0.37", "currentColor"),
        ("code, b: inf", "0.67", None),
    ]
    assert (shapes[0].get("x"), shapes[2].get("x")) == ("231.0", "411.0")  # 180 wide
    assert (shapes[0].get("y"), shapes[1].get("y")) == ("67.0", "105.0")  # 38 high
    assert {"docs", "code", "a", "b", "+171.8 %", "inf"} <= set(texts(drawing))


def test_a_matrix_of_nothing_is_still_a_drawing():
    drawing = matrix_chart("Change", ["docs"], ["a"], {}, numbers.change)
    assert "docs" in texts(drawing)
    assert not [s for s in ElementTree.fromstring(drawing).iter(f"{SVG}rect") if s.find(f"{SVG}title") is not None]


@pytest.mark.parametrize(
    "drawing",
    [
        line_plot(HOSTILE, [Line(HOSTILE, {1: 1.0, 2: 2.0})], HOSTILE, HOSTILE, lambda y: HOSTILE, (HOSTILE, 1.0)),
        matrix_chart(HOSTILE, [HOSTILE], [HOSTILE], {(0, 0): 1.0}, lambda y: HOSTILE),
    ],
)
def test_drawings_are_well_formed_named_and_escaped(drawing):
    root = ElementTree.fromstring(drawing)
    assert root.get("role") == "img"
    assert HOSTILE in root.find(f"{SVG}title").text
    assert root.find(f"{SVG}desc").text
    assert "<script>" not in drawing
    assert "#" not in re.sub(r"var\(--[\w-]+, #\w+\)", "", drawing)  # every colour follows the page


def test_labels_of_the_x_axis_are_short_and_apart():
    xs = [1.0, 1.0054, 1.05544, 1.84798, 1.88711, 2.00944, 4096.0]
    drawing = line_plot("t", [Line("a", dict.fromkeys(xs[:6], 1.0))], "x", "y", str)
    labels = [
        (float(x), word) for x, word in re.findall(r'<text x="([\d.]+)" y="382[^>]*middle[^>]*>([^<]+)<', drawing)
    ]
    assert [word for _, word in labels] == ["1", "1.85", "2.01"]  # 1.05544 would touch the first
    assert all(b[0] - a[0] >= 26 for a, b in pairwise(labels))
    assert ">1.06<" in line_plot("t", [Line("a", {0.5: 1.0, 1.05544: 1.0})], "x", "y", str)
    assert ">4096<" in line_plot("t", [Line("a", dict.fromkeys(xs, 1.0))], "x", "y", str)
