"""The documents say what the code does: pages, options, defaults, keys, links, recipes and examples."""

import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import sparity
from sparity import recipe as schema
from sparity import registry
from sparity.calibration import Statistics
from sparity.calibration.input_statistics import column_norm
from sparity.cli.main import VERBS, app
from sparity.measure.data import bench_report, report, sensitivity_report, sweep_report
from sparity.models.families import llama
from sparity.pipeline.run.job import prepare
from sparity.recipe import Recipe
from sparity.static.prune.scores import wanda
from sparity.static.structure import channels
from sparity.sweep_file import Sweep, SweepFile

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(work|home|root|tmp|mnt|Users|opt|usr|var)/")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def own(kind):
    """Sparity's own plug-ins of a kind, without those that a test or another package registered."""
    return [name for name in registry.names(kind) if registry.get(kind, name).__module__.startswith("sparity.")]


KINDS = ("stage", "prune.score", "prune.pattern", "prune.solver", "activations.method", "budget", "encoding")
PLUGINS = [(kind, name) for kind in KINDS for name in own(kind)]
STATISTICS = [("statistic", name) for name in own("statistic")]


def needs_of(kind, plugin):
    """The statistics that a plug-in reads, with its default options."""
    if kind == "stage":
        return sorted(plugin().needs().statistics)
    return sorted(plugin().statistics) if kind == "activations.method" else getattr(plugin, "needs", ())


def page_of(kind, name):
    return f"{kind.replace('.', '/')}/{name}.md"


def blocks(document, language):
    return [text for kind, text in BLOCK.findall(document.read_text()) if kind == language]


def rows(text):
    """The cells of every table row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def section(text, heading):
    """The text under a heading, up to the next of the same or a higher level."""
    level = len(heading) - len(heading.lstrip("#"))
    start = text.index(f"\n{heading}\n") + len(heading) + 2
    end = re.search(rf"^#{{1,{level}}} ", text[start:], re.MULTILINE)
    return text[start : start + end.start()] if end else text[start:]


# ---- plug-ins


@pytest.mark.parametrize(("kind", "name"), PLUGINS, ids=[name for _, name in PLUGINS])
def test_a_plugin_has_a_page_with_its_options_defaults_statistics_and_sections(kind, name):
    plugin, text = registry.get(kind, name), (ROOT / "docs/methods" / page_of(kind, name)).read_text()
    assert text.startswith(f"# {name}\n")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    wanted = ["Formula", "Source", "Reference code and Sparity", "Options", "Statistics", "Recipe", "Pitfalls"]
    assert headings == wanted
    options = {cells[0]: cells[1] for cells in rows(section(text, "## Options"))[2:]}
    expected = options_of(kind, plugin)
    assert options == expected
    assert options or section(text, "## Options").strip() == "None."
    for statistic in needs_of(kind, plugin):
        assert f"`{statistic}`" in section(text, "## Statistics")
    for source in re.findall(r"arXiv:[\d.]+\d", source_of(plugin)):
        assert source in text


def options_of(kind, plugin):
    """Option -> default, as the tables write them."""
    if kind == "stage":
        return {f"`{name}`": default_words(field) for name, field in plugin.model_fields.items()}
    return {f"`{field.name}`": shown(field) for field in dataclasses.fields(plugin)}


@pytest.mark.parametrize(("kind", "name"), STATISTICS, ids=[name for _, name in STATISTICS])
def test_a_statistic_has_a_page_that_names_its_readers_and_its_key_in_a_store(kind, name):
    statistic, text = registry.get(kind, name), (ROOT / "docs/methods" / page_of(kind, name)).read_text()
    assert text.startswith(f"# {name}\n")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Formula", "Source", "Read by", "Bytes", "Pitfalls"]
    readers = {
        reader for other, reader in PLUGINS if other != "stage" and name in needs_of(other, registry.get(other, reader))
    }
    assert {word for word in code(section(text, "## Read by")) if word != "measure.layer_loss"} == readers
    assert any(key.startswith(f"{statistic.stored_as or name}.SITE") for key in code(section(text, "## Bytes")))
    for source in re.findall(r"arXiv:[\d.]+\d", source_of(statistic)):
        assert source in text


def shown(field):
    return "required" if field.default is dataclasses.MISSING else f"`{field.default}`"


def source_of(plugin):
    """The docstring of the plug-in's file, which names its paper."""
    return importlib.import_module(plugin.__module__).__doc__ or ""


def test_the_index_lists_every_plugin_with_what_it_needs():
    text = (ROOT / "docs/methods/README.md").read_text()
    listed = {(cells[0], cells[1]): cells[3:] for cells in rows(text)[2:]}
    assert listed.keys() == {(kind, f"[{name}]({page_of(kind, name)})") for kind, name in PLUGINS + STATISTICS}
    for (kind, link), (needs, group) in listed.items():
        plugin = registry.get(kind, link[1 : link.index("]")])
        if kind == "stage" and plugin.name != "prune":  # whose parts say it
            assert needs == ", ".join(f"`{need}`" for need in sorted(plugin().needs().statistics))
        if kind in ("prune.score", "prune.solver", "activations.method"):
            assert needs == (", ".join(f"`{need}`" for need in needs_of(kind, plugin)) or "nothing")
        if kind == "prune.score":
            assert group == plugin.compare_within


def test_every_page_belongs_to_a_plugin():
    folder = ROOT / "docs/methods"
    pages = {str(path.relative_to(folder)) for path in folder.rglob("*.md")} - {"README.md"}
    assert pages == {page_of(kind, name) for kind, name in PLUGINS + STATISTICS}


def test_every_family_is_described():
    listed = {cells[0] for cells in rows((ROOT / "docs/models.md").read_text())[2:]}
    assert listed == {f"`{name}`" for name in own("family")}


# ---- recipes, report, format


# The sections of a recipe, in the order in which docs/recipe.md has a table for each.
SECTIONS = (
    schema.Recipe,
    schema.Calibration,
    schema.Measure,
    schema.Text,
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


def default_words(field):
    if field.is_required():
        return "required"
    default = field.default if field.default is not PydanticUndefined else field.default_factory()
    if isinstance(default, BaseModel):
        return "see below"
    return "none" if default is None else f"`{str(default).lower()}`"


def test_the_format_page_names_every_field_of_the_report_and_of_the_record(tmp_path):
    text = (ROOT / "docs/format.md").read_text()
    parts = [part for part in vars(report).values() if dataclasses.is_dataclass(part)]
    fields = {field.name for part in parts for field in dataclasses.fields(part)}
    assert len(parts) == 12
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


def code(text):
    return re.findall(r"`([^`]+)`", text)


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


# ---- links, paths, commands, examples


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_link_resolves(document):
    prose = BLOCK.sub("", document.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (document.parent / file).resolve() if file else document
        assert found.is_relative_to(ROOT), target
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def anchors(document):
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*DOCUMENTS, *sorted((ROOT / "recipes").rglob("*.yaml"))], ids=lambda path: path.name)
def test_no_document_names_a_path_of_a_machine(path):
    assert not MACHINE_PATH.search(path.read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_in_a_document_is_understood(document):
    verbs = typer.main.get_command(app).commands
    lines = [line.split(" #")[0] for text in blocks(document, "bash") for line in text.splitlines()]
    prose = BLOCK.sub("", document.read_text())
    lines += [span for span in code(prose) if span.startswith("sparity ")]
    for line in lines:
        name, *words = shlex.split(line.split(" > ")[0]) or [""]
        if name == "sparity" and words[0] in VERBS and words[1:]:  # a verb alone is only its name
            verbs[words[0]].make_context(words[0], words[1:])  # raises on an unknown option or a missing argument


def test_every_verb_is_in_the_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert [verb for verb in VERBS if f"`{verb}`" not in text] == []


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    examples = blocks(ROOT / "README.md", "python")
    assert len(examples) == 3
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert re.match(r"perplexity [\d.]+ -> [\d.]+ \(\w+\), KL [\d.]+\n[\d.]+\n$", capsys.readouterr().out)
    assert names["quality"].perplexity > names["quality"].dense_perplexity


def test_the_examples_of_the_sweep_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(ROOT / "docs/sweep.md", "python")
    exec(compile(example, "sweep.md", "exec"), {})
    assert re.fullmatch(r"0\.25 [\d.]+\n0\.5 [\d.]+\n", capsys.readouterr().out)
    assert sorted(path.name for path in Path("magnitude-sweep").iterdir()) == ["sweep.csv", "sweep.html", "sweep.json"]


def test_the_examples_of_contributing_work(monkeypatch, tmp_path):
    """Each in the file that it tells to take the imports from, and gone again afterwards."""
    homes = [channels, wanda, column_norm, llama]
    examples = blocks(ROOT / "CONTRIBUTING.md", "python")
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    for home, example in zip(homes, examples, strict=True):
        exec(compile(example, "CONTRIBUTING.md", "exec", dont_inherit=True), dict(vars(home)))
    recipe = {"model": "zoo:llama", "stages": [{"flush": {"below": 0.02}}], "measure": {"speed": None}}
    for change in sparity.run(recipe, output=tmp_path / "out").report.candidates[0].changes:
        assert change.stage == "flush"
        assert 0 < change.zeros < 1
    weight, inputs = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[4.0, 1.0, 1.0, 1.0]])
    keep = sparity.prune_weight(weight, inputs, score="cubed", pattern="2:4", power=1.0)[1]
    assert keep.tolist() == [[True, False, False, True]]  # scores 4, 2, 3, 4
    statistics = Statistics.gather("here", ["mean_size"])
    statistics.add(torch.tensor([[1.0, -4.0], [2.0, 3.0]]))
    assert statistics["mean_size"].tolist() == [1.5, 3.5]
    assert registry.get("family", "example").blocks == "transformer.layers"
