"""The pages on recipes and files name every key and field."""

import dataclasses
import json
import re

import pytest

import sparity
from documents import DOCUMENTS, NAMES, ROOT, blocks, code, default_words, rows, section
from sparity import recipe as schema
from sparity.measure.data import bench_report, report, sensitivity_report, sweep_report
from sparity.pipeline.run.job import prepare
from sparity.recipe import Recipe
from sparity.sweep_file import Sweep, SweepFile

# The sections of a recipe, in the order in which docs/recipe.md has a table for each.
SECTIONS = (
    schema.Recipe,
    schema.Calibration,
    schema.Measure,
    schema.Text,
    schema.Tasks,
    schema.SpeedTest,
    schema.Accept,
    schema.Output,
)


def test_the_recipe_page_names_every_key_with_its_default():
    tables = re.split(r"^\| key \| default \| meaning \|\n", (ROOT / "docs/recipe.md").read_text(), flags=re.MULTILINE)
    assert len(tables) - 1 == len(SECTIONS)
    for model, table in zip(SECTIONS, tables[1:], strict=True):
        written = table.split("\n\n")[0]
        listed = {cells[0]: cells[1] for cells in rows(written)[1:]}
        assert listed == {f"`{key}`": default_words(field) for key, field in model.model_fields.items()}, model


def test_the_format_page_names_every_field_of_the_report_and_of_the_record(tmp_path):
    text = (ROOT / "docs/format.md").read_text()
    parts = [part for part in vars(report).values() if dataclasses.is_dataclass(part)]
    fields = {field.name for part in parts for field in dataclasses.fields(part)}
    assert len(parts) == 14
    assert {field for field in fields if f"`{field}`" not in text} == set()
    model = {"model": "zoo:llama", "stages": [{"prune": {"score": "magnitude"}}], "measure": {"speed": None}}
    result = sparity.run(model, output=tmp_path / "out")
    record = json.loads((result.path / "sparity.json").read_text())
    listed = {cells[0] for cells in rows(section(text, "### sparity.json"))[2:]}
    assert listed == {f"`{key}`" for key in record}
    for key in record["identity"]:
        assert f"`{key}`" in section(text, "### sparity.json")
    table = section(text, "## The plain export").split("###")[0]
    for path in result.path.iterdir():
        patterns = [name.replace("NNNNN", "*").replace("00001", "*").replace("00002", "*") for name in code(table)]
        assert any(path.match(pattern) for pattern in patterns) or path.name == "special_tokens_map.json", path.name


def test_the_sweep_page_names_every_key_column_and_field():
    text = (ROOT / "docs/sweep.md").read_text()
    listed = [cells[0] for cells in rows(section(text, "## The file").split("An axis of")[0])[2:]]
    assert listed == [f"`{key}`" for key in SweepFile.model_fields]
    fields = {cells[0]: code(cells[1]) for cells in rows(section(text, "### sweep.json"))[2:]}
    for name, kind in (("sweep", sweep_report.SweepReport), ("axis", sweep_report.Axis), ("row", sweep_report.Row)):
        assert sorted(fields[name]) == sorted(field.name for field in dataclasses.fields(kind))
    columns = section(text, "### sweep.json").split("The columns of `sweep.csv` are the axes, then ")[1]
    assert tuple(code(columns)) == sweep_report.COLUMNS
    files = [cells[0] for cells in rows(section(text, "## What it writes").split("###")[0])[2:]]
    assert files == ["`sweep.json`", "`sweep.csv`", "`sweep.html`"]


def test_the_sensitivity_page_names_every_field():
    text = (ROOT / "docs/sensitivity.md").read_text()
    whole, row = (
        [code(cells[0])[0] for cells in rows(part)[2:]] for part in section(text, "## The file").split("A row:")
    )
    assert whole == ["format", *(field.name for field in dataclasses.fields(sensitivity_report.SensitivityReport))]
    assert row == [field.name for field in dataclasses.fields(sensitivity_report.Sensitivity)]
    blocks_row = next(cells for cells in rows(text) if cells[0] == "`blocks`")
    assert code(blocks_row[1]) == [field.name for field in dataclasses.fields(sensitivity_report.BlockFacts)]


def test_the_bench_page_names_every_field():
    table = rows(section((ROOT / "docs/bench.md").read_text(), "## The file"))[2:]
    content = {cells[0].strip("`"): cells[1] for cells in table}
    named = [field for cells in table for field in code(cells[0])]
    assert sorted(named) == sorted(["format", *(field.name for field in dataclasses.fields(bench_report.BenchReport))])
    kinds = {"runners": bench_report.Runner, "timings": bench_report.Timing, "ratios": bench_report.Ratio}
    for name, kind in (*kinds.items(), ("skipped", bench_report.Skipped)):
        assert {field.name for field in dataclasses.fields(kind)} <= set(code(content[name])), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_recipe_in_a_document_is_valid(document, tmp_path):
    for number, text in enumerate(blocks(document, "yaml")):
        if "stages:" not in text:
            continue
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        if "\nvary:" in text:
            assert Sweep.read(path).combinations
            continue
        small = ["calibration.samples=1", "calibration.length=8"] if "calibration:" in text else []
        prepare(Recipe.read(path, small), device="cpu")  # names, options, targets and texts are checked here
