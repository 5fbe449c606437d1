"""The pictures of the documents: whole, self-contained, used, and showing the figures that the documents give."""

import json
import re
from xml.etree import ElementTree

import pytest

import draw_demo
from documents import DOCUMENTS, ROOT, rows
from sparity.errors import InvalidInput

PICTURES = sorted((ROOT / "docs/pictures").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_shown_and_needs_nothing_else(picture):
    tree = ElementTree.parse(picture)
    assert tree.getroot().tag == f"{SVG}svg"
    assert tree.find(f".//{SVG}title").text
    names = {element.tag.removeprefix(SVG) for element in tree.iter()}
    assert names & {"script", "image", "foreignObject", "use"} == set()
    links = [value for element in tree.iter() for key, value in element.attrib.items() if key.endswith("href")]
    assert links == []
    assert "prefers-color-scheme: dark" in picture.read_text().replace("scheme:dark", "scheme: dark")
    shown = [document for document in DOCUMENTS if f"pictures/{picture.name})" in document.read_text()]
    assert shown != []


def test_the_picture_of_the_readme_has_the_perplexities_of_the_figures():
    table = rows((ROOT / "docs/figures.md").read_text())[2:9]
    drawn = [element.text for element in ElementTree.parse(ROOT / "docs/pictures/demo.svg").iter(f"{SVG}text")]
    assert [cells[2] for cells in table if cells[2] in drawn] == [cells[2] for cells in table]
    changes = [cells[3].split(",")[0] for cells in table if cells[3]]
    assert [change for change in changes if f"{change} perplexity" not in drawn] == []


def pace(rate):
    return {"first_token": None, "decode": {"median": rate, "low": rate, "high": rate}}


REPORT = {
    "model": "small",
    "candidates": [
        {"name": "half", "quality": [{"text": "a text", "dense_perplexity": 20.0, "perplexity": 25.0, "change": 0.25}]}
    ],
    "larger": {
        "parameters": 2_000_000,
        "sparsity": 0.5,
        "bytes_dense": 4000,
        "bytes_sparse": 2500,
        "speed": {"dense": pace(10.0), "sparse": pace(40.0), "engine_dense": {"pace": pace(20.0)}},
    },
}


def bars(svg):
    """Width of every bar in the drawing, in order; a legend's swatch is no bar."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}rect")
    return [float(bar.get("width")) for bar in found if bar.find(f"{SVG}title") is not None]


def test_bars_are_as_long_as_what_they_show(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    draw_demo.main(tmp_path / "report.json", tmp_path / "picture.svg")
    dense, half, transformers, engine, sparse = bars((tmp_path / "picture.svg").read_text())
    assert half / dense == pytest.approx(25 / 20, rel=1e-3)
    assert engine / transformers == pytest.approx(2, rel=2e-3)
    assert sparse / transformers == pytest.approx(4, rel=2e-3)


def test_a_report_without_speed_has_one_chart():
    without = {**REPORT, "larger": None}
    assert len(bars(draw_demo.draw(without))) == 2
    assert re.findall(r"tokens/s", draw_demo.draw(without)) == []
    with pytest.raises(InvalidInput, match="take the report"):
        draw_demo.draw({**without, "candidates": []})
