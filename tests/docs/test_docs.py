"""Links, paths, commands and examples in the documents."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

import sparity
from documents import BLOCK, DOCUMENTS, NAMES, ROOT, blocks, code
from sparity import registry
from sparity.calibration import Statistics
from sparity.calibration.input_statistics import column_norm
from sparity.cli.main import VERBS, app
from sparity.models.families import llama
from sparity.static import channels
from sparity.static.prune.scores import wanda

MACHINE_PATH = re.compile(r"(?<![\w.~-])/(work|home|root|tmp|mnt|Users|opt|usr|var)/")


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
    examples = [example for example in blocks(ROOT / "README.md", "python") if "OpenAI" not in example]
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
