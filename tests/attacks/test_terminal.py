"""Keys, names and arguments that hold what a terminal acts on: shown escaped and short, wherever they are shown."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sparity.cli import console, output
from sparity.cli.main import app
from sparity.measure.charts.drawing import draw_text
from sparity.measure.show.page import page
from test_visible import acting

EVIL = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e"
LONG = "k" * 100_000
MOST = 6000  # characters of everything that a refusal prints


def said(*arguments):
    """What a command prints; it must fail, and nothing that it prints may act or be endless."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    text = result.stdout + result.stderr
    assert acting(text, "\n") == []
    assert len(text) < MOST
    return text


RECIPES = {
    "a key": {EVIL: 1},
    "a long key": {LONG: 1},
    "a key below": {"calibration": {EVIL: 1}},
    "a value": {"dtype": EVIL},
    "a long value": {"dtype": LONG},
    "a stage": {"stages": [{EVIL: {}}]},
    "an option": {"stages": [{"prune": {EVIL: 1}}]},
    "a score": {"stages": [{"prune": {"score": EVIL}}]},
    "a long score": {"stages": [{"prune": {"score": LONG}}]},
    "an option of a score": {"stages": [{"prune": {"score": {"obs": {EVIL: 1}}}}]},
    "a model": {"model": EVIL},
    "a long model": {"model": LONG},
    "a pattern of overrides": {"stages": [{"prune": {"score": "magnitude", "overrides": {EVIL: 0.5}}}]},
    "a text": {"calibration": {"text": f"{EVIL}.txt"}},
    "tokens": {"calibration": {"tokens": EVIL}},
    "many keys": {f"{EVIL}{number}": 1 for number in range(1000)},
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_recipe(recipe, tmp_path, name, verb):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**recipe(), **RECIPES[name]}))
    said(verb, path, *(["-o", tmp_path / "out"] if verb == "run" else []))


@pytest.mark.parametrize("word", [EVIL, LONG, f"{EVIL}=1", f"a=[{LONG}", f"stages.{EVIL}.x=1", "a." * 5000 + "b=1"])
def test_an_override(recipe, tmp_path, word):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe()))
    said("plan", path, word)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", EVIL],
        ["sweep", EVIL, "-o", "x"],
        ["eval", EVIL],
        ["bench", EVIL],
        ["bench", "zoo:llama", "--batch", EVIL],
        ["generate", LONG, "x"],
        ["convert", "zoo:llama", "x", "--values", EVIL],
        ["convert", "zoo:llama", "x", "--to", LONG],
        ["verify", EVIL],
        ["verify", LONG],
        ["explain", EVIL],
        ["methods", LONG],
        [EVIL],
        [LONG],
        ["run", "x", f"--{EVIL}"],
        ["run", "x", f"--{LONG}"],
        ["prune", "m", "-o", "x", "--samples", EVIL],
    ],
    ids=lambda arguments: f"{arguments[0][:8]!r}-{len(''.join(arguments))}",
)
def test_an_argument(arguments):
    said(*arguments)


@pytest.mark.parametrize("name", [EVIL, LONG])
def test_a_field_of_a_file(tmp_path, stories_model, name):
    (tmp_path / "a.jsonl").write_text(json.dumps({name: "some text"}) + "\n")
    said("eval", stories_model, "--text", tmp_path / "a.jsonl")


def test_tables_and_lines_of_a_console(capsys):
    from rich.table import Table
    from rich.text import Text

    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    table.add_row(Text(EVIL))
    terminal = console.VisibleConsole()
    for shown in (EVIL, Text(EVIL), table):
        terminal.print(shown)
        assert acting(capsys.readouterr().out, "\n") == []


def test_json_on_standard_output(capsys):
    console.print_json({"text": EVIL + "\x7f"})
    text = capsys.readouterr().out
    assert acting(text, "\n") == []
    assert json.loads(text) == {"text": EVIL + "\x7f"}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_model_that_says_such_things(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    output.write(f"once {EVIL}\n")
    text = capsys.readouterr().out
    assert bool(acting(text, "\n")) is not terminal  # a file gets what the model said


def test_pages():
    whole = page(EVIL, [draw_text(0, 0, EVIL)], {"cpu": EVIL})
    assert acting(whole, "\n") == []
    assert r"\x1b]0;pwned" in whole


def test_logs_warnings_and_tracebacks_of_a_process():
    script = (
        "import logging, warnings; from sparity.cli import console; console.guard_terminal(); "
        f"evil = {EVIL!r}; logging.getLogger('other').warning('%s', evil); warnings.warn(evil); "
        "raise RuntimeError(evil)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.count(r"\x1b]0;pwned") >= 3
    assert acting(done.stderr, "\n") == []
