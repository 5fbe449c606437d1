"""A sweep's table as JSON, CSV, page and terminal table."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from pages import Page, rows
from sparity.errors import CorruptFile
from sparity.measure.data.report import Quality, Verdict
from sparity.measure.data.sweep_report import COLUMNS, Axis, Row, SweepReport
from sparity.measure.show.page_sweep import render_sweep
from sparity.measure.show.table_sweep import print_sweep

HOSTILE = '<script>alert("x")</script>'


def quality(text, perplexity, kl):
    return Quality(text, 32, 400, 10.0, perplexity, perplexity / 10 - 1, "good", kl, 0.75)


def row(*labels, perplexity=12.5, texts=("docs", "code"), **changes):
    measured = tuple(quality(text, perplexity * (place + 1), 0.25) for place, text in enumerate(texts))
    known = {"model": "tiny", "method": "wanda, 50%", "target": 0.5, "sparsity": 0.4375, "model_sparsity": 0.25}
    return Row(labels, {"stages": []}, quality=measured, seconds=2.5, peak_memory=780_000_000, **{**known, **changes})


@pytest.fixture
def report():
    """Two methods at two sparsities on two texts; the last combination failed."""
    axes = (Axis("method", ("wanda", "ria")), Axis("stages.0.prune.sparsity", ("0.3", "0.5"), (0.3, 0.5)))
    failed = Row(("ria", "0.5"), {"stages": []}, "weights hold NaN", model="tiny")
    found = (row("wanda", "0.3"), row("wanda", "0.5", perplexity=20.0), row("ria", "0.3", perplexity=11.0), failed)
    return SweepReport({"model": "tiny"}, axes, found, {"processor": "Example 9000"})


def parsed(report):
    return list(csv.DictReader(io.StringIO(report.to_csv(), newline="")))


def test_json_holds_every_row_by_the_names_of_the_axes(report):
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["format"] == 2
    assert [axis["name"] for axis in content["axes"]] == ["method", "stages.0.prune.sparsity"]
    assert content["axes"][1]["numbers"] == [0.3, 0.5]
    assert content["base"] == {"model": "tiny"}
    assert content["machine"] == {"processor": "Example 9000"}
    assert [r["labels"] for r in content["rows"]] == [
        {"method": method, "stages.0.prune.sparsity": sparsity}
        for method in ("wanda", "ria") for sparsity in ("0.3", "0.5")
    ]  # fmt: skip
    first, last = content["rows"][0], content["rows"][-1]
    assert (first["sparsity"], first["quality"][1]["perplexity"], first["message"]) == (0.4375, 25.0, None)
    assert (last["message"], last["quality"], last["sparsity"]) == ("weights hold NaN", [], None)


def test_a_row_is_read_as_it_was_written():
    broken = replace(quality("docs", 12.0, 0.1), perplexity=math.inf, change=math.inf)
    judged = row("a", "b", verdicts=(Verdict("KL at most 1", "0.25", passed=True),), decode_ratio=1.5)
    for given in (judged, replace(judged, quality=(broken,)), Row(("x",), {"a": [1]}, "failed")):
        written = json.loads(json.dumps(given.to_dict(), allow_nan=False))
        assert Row.from_dict(written, "row.json") == given


@pytest.mark.parametrize("content", [{}, {"labels": 5}, {"labels": ["a"], "quality": [{}], "verdicts": []}])
def test_a_damaged_row_is_said_to_be_one(content):
    with pytest.raises(CorruptFile, match=r"row\.json is damaged"):
        Row.from_dict(content, "row.json")


def test_csv_has_a_line_per_combination_and_text(report):
    lines = parsed(report)
    assert report.to_csv().splitlines()[0] == ",".join(["method", "stages.0.prune.sparsity", *COLUMNS])
    assert report.to_csv().endswith("\r\n")
    assert len(lines) == 3 * 2 + 1
    assert [(line["method"], line["stages.0.prune.sparsity"], line["text"]) for line in lines] == [
        ("wanda", "0.3", "docs"), ("wanda", "0.3", "code"), ("wanda", "0.5", "docs"), ("wanda", "0.5", "code"),
        ("ria", "0.3", "docs"), ("ria", "0.3", "code"), ("ria", "0.5", ""),
    ]  # fmt: skip
    keys = ("status", "realised_sparsity", "perplexity", "kl", "window", "message")
    assert [lines[3][key] for key in keys] == ["done", "0.4375", "40.0", "0.25", "32", ""]
    assert (lines[6]["status"], lines[6]["message"], lines[6]["perplexity"]) == ("failed", "weights hold NaN", "")
    assert (lines[0]["dense_model"], lines[0]["sparse_model"], lines[0]["accepted"]) == ("tiny", "wanda, 50%", "")


def test_csv_survives_any_label_and_gives_no_spreadsheet_a_formula():
    labels = ('a "b", c', "=1+1", "-0.5", "@x", "+5%", "-x")
    axes = tuple(Axis(f"axis, {number}", (label,)) for number, label in enumerate(labels))
    report = SweepReport({}, axes, (row(*labels, message="two\nlines", texts=()),), {})
    (line,) = parsed(report)
    assert [line[axis.name] for axis in axes] == ['a "b", c', "'=1+1", "-0.5", "'@x", "'+5%", "'-x"]
    assert line["message"] == "two\nlines"
    judged = row("a", verdicts=(Verdict("", "", passed=False),), texts=())
    assert parsed(SweepReport({}, (Axis("x", ("a",)),), (judged,), {}))[0]["accepted"] == "no"


def test_heads_are_short_where_that_tells_them_apart():
    axes = (Axis("a.x", ("1",)), Axis("b.x", ("1",)), Axis("a.y", ("1",)))
    assert SweepReport({}, axes, (), {}).heads() == ("a.x", "b.x", "y")


def test_the_page_is_balanced_has_no_script_and_every_row(report):
    drawn = render_sweep(report)
    page = Page(drawn)
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(page.tags)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    found = [[" ".join(cell) for cell in cells] for cells in rows(drawn)]
    agreement, cost = "0.2500 75.0 %", ["2.5 s", "780.0 MB"]
    assert found == [
        ["method", "sparsity", "realised sparsity", "perplexity, docs, windows of 32", "KL, and same top-1",
         "perplexity, code, windows of 32", "KL, and same top-1", "time of the run", "peak memory"],
        ["dense", "", "", "10.00", "", "10.00", "", "", ""],
        ["wanda", "0.3", "43.8 %", "12.50 +25.0 %", agreement, "25.00 +150.0 %", agreement, *cost],
        ["wanda", "0.5", "43.8 %", "20.00 +100.0 %", agreement, "40.00 +300.0 %", agreement, *cost],
        ["ria", "0.3", "43.8 %", "11.00 +10.0 %", agreement, "22.00 +120.0 %", agreement, *cost],
        ["ria", "0.5", "failed", "", "", "", "", "", ""],
    ]  # fmt: skip
    assert "4 combinations of method (2) and sparsity (2); 1 failed." in page.text
    assert "ria, 0.5 failed: weights hold NaN" in page.text
    assert page.text.endswith("processor Example 9000")


def test_a_numeric_axis_has_a_plot_of_perplexity_and_of_kl_for_each_text(report):
    drawn = render_sweep(report)
    assert drawn.count("<svg") == 4
    assert "<desc>wanda: 12.50 at 0.3, 20.00 at 0.5; ria: 11.00 at 0.3, nan at 0.5</desc>" in drawn
    assert "<title>dense: 10.00</title>" in drawn
    assert "Quality against sparsity" in drawn


def test_without_a_numeric_axis_there_is_a_matrix(report):
    words = replace(report, axes=(report.axes[0], replace(report.axes[1], numbers=None)))
    drawn = render_sweep(words)
    assert drawn.count("<svg") == 2
    assert "<title>wanda, 0.3, docs: +25.0 %</title>" in drawn
    assert "<title>ria, 0.3, code: 0.2500</title>" in drawn
    one_value = replace(report, axes=(report.axes[0], Axis("s", ("0.3",), (0.3,))), rows=(row("wanda", "0.3"),))
    assert render_sweep(one_value).count("<svg") == 2  # a line needs two points


def test_what_was_not_measured_is_not_drawn(report):
    bare = replace(report, rows=tuple(replace(r, quality=()) for r in report.rows))
    drawn = render_sweep(bare)
    assert "<svg" not in drawn
    assert [len(cells) for cells in rows(drawn)] == [5] * 5
    judged = replace(report, rows=(row("a", "b", verdicts=(Verdict("", "", passed=True),), decode_ratio=1.25),))
    assert [" ".join(cell) for cell in rows(render_sweep(judged))[2]][-4:] == ["1.25x", "✓ kept", "2.5 s", "780.0 MB"]


def test_hostile_names_appear_as_text(report):
    axes = (Axis(HOSTILE, (HOSTILE,)), Axis("[red]x", ("[bold]1",)))
    hostile = SweepReport({HOSTILE: HOSTILE}, axes, (row(HOSTILE, "[bold]1", texts=(HOSTILE,), model=HOSTILE),), {})
    failed = replace(hostile, rows=(replace(hostile.rows[0], message=HOSTILE),))
    for drawn in (render_sweep(hostile), render_sweep(failed)):
        assert "<script" not in drawn
        assert 'alert("x")' in Page(drawn).text
    assert "[bold]1" in printed(hostile)
    assert "[red]x" in printed(hostile)


def printed(report, width=160):
    console = Console(file=io.StringIO(), width=width)
    print_sweep(report, console)
    return console.file.getvalue()


def test_the_terminal_has_a_row_per_combination(report):
    lines = [" ".join(line.split()) for line in printed(report).splitlines()]
    assert lines == [
        "4 combinations of method (2) and sparsity (2); 1 failed.",
        "method sparsity realised docs code time",
        "wanda 0.3 43.8 % 12.50 25.00 2.5 s",
        "+25.0 % +150.0 %",
        "wanda 0.5 43.8 % 20.00 40.00 2.5 s",
        "+100.0 % +300.0 %",
        "ria 0.3 43.8 % 11.00 22.00 2.5 s",
        "+10.0 % +120.0 %",
        "ria 0.5 failed - - -",
        "",
        "The dense model has a perplexity of 10.00 on docs, 10.00 on code.",
        "failed ria, 0.5: weights hold NaN",
    ]


def test_one_text_leaves_room_for_every_measure(report):
    one = replace(report, rows=(row("wanda", "0.3", texts=("docs",)), report.rows[3]))
    lines = [line.split() for line in printed(one, 80).splitlines()]
    assert lines[1] == ["method", "sparsity", "realised", "perplexity", "change", "KL", "top-1", "time"]
    assert lines[2] == ["wanda", "0.3", "43.8", "%", "12.50", "+25.0", "%", "0.2500", "75.0", "%", "2.5", "s"]
    assert lines[3] == ["ria", "0.5", "failed", "-", "-", "-", "-", "-"]
    assert not re.search("…", printed(one, 80))


def test_four_texts_fit_80_columns(report):
    texts = ("stories", "a text of a long name.json", "maths", "code")
    axes = (Axis("calibrated on", ("stories",)), Axis("method", ("sparsegpt",)))
    wide = replace(report, axes=axes, rows=(row("stories", "sparsegpt", texts=texts, perplexity=1234.5),))
    text = printed(wide, 80)
    table = text.split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in text
    (line,) = (line.split() for line in table.splitlines() if line.startswith("stories"))
    assert line == ["stories", "sparsegpt", "43.8", "%", "1,234", "2,469", "3,704", "4,938", "2.5", "s"]


def mixed(report):
    """The first row with channels cut, the second without a target and with channels skipped at run time."""
    first, second, *others = report.rows
    first = replace(first, parameters_left=0.75, target=None)
    return replace(report, rows=(first, replace(second, parameters_left=0.5, skipped=0.375, target=None), *others))


def test_a_row_says_what_is_left_and_what_is_skipped(kinds):
    found = {kind: Row.of(("a",), {}, report) for kind, report in kinds.items()}
    assert {kind: (row.target, row.sparsity, row.parameters_left) for kind, row in found.items()} == {
        "pruned": (0.5, 0.5, None),
        "cut": (None, 0.0, 0.88),
        "skipping": (None, 0.0, None),
        "quantised": (None, 0.0, None),
        "healed": (None, 0.0, None),
        "nothing": (None, 0.0, None),
        "all": (0.5, 0.5, 0.88),
    }
    skipped = {kind: row.skipped for kind, row in found.items() if row.skipped is not None}
    assert skipped == {"skipping": pytest.approx(0.41), "all": pytest.approx(7.3 / 18)}


def test_what_is_left_and_skipped_has_columns_where_some_row_has_any(report):
    assert Row.from_dict(json.loads(json.dumps(mixed(report).rows[1].to_dict())), "row.json") == mixed(report).rows[1]
    lines = parsed(mixed(report))
    assert [(line["target"], line["parameters_left"], line["skipped"]) for line in lines[:5:2]] == [
        ("", "0.75", ""),
        ("", "0.5", "0.375"),
        ("0.5", "", ""),
    ]
    found = [[" ".join(cell) for cell in cells[:6]] for cells in rows(render_sweep(mixed(report)))]
    assert found == [
        ["method", "sparsity", "realised sparsity", "parameters left", "skipped at run time",
         "perplexity, docs, windows of 32"],
        ["dense", "", "", "", "", "10.00"],
        ["wanda", "0.3", "43.8 %", "75.0 %", "", "12.50 +25.0 %"],
        ["wanda", "0.5", "43.8 %", "50.0 %", "37.5 %", "20.00 +100.0 %"],
        ["ria", "0.3", "43.8 %", "", "", "11.00 +10.0 %"],
        ["ria", "0.5", "failed", "", "", ""],
    ]  # fmt: skip
    assert len({len(cells) for cells in rows(render_sweep(mixed(report)))}) == 1
    lines = [" ".join(line.split()) for line in printed(mixed(report)).splitlines()]
    assert lines[2:7] == [
        "wanda 0.3 43.8 % 12.50 25.00 2.5 s",
        "75.0 % left +25.0 % +150.0 %",
        "wanda 0.5 43.8 % 20.00 40.00 2.5 s",
        "50.0 % left +100.0 % +300.0 %",
        "37.5 % skipped",
    ]
