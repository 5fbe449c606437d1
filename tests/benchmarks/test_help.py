"""`--help` of every benchmark and of every verb: it is printed and ends well."""

import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparity.cli.main import VERBS, app

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = sorted(path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text())


def test_there_are_programs():
    assert {"decode.py", "gemv.py", "pareto.py", "smollm2.py"} <= set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_explains_itself(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {name} ")
    assert f"python benchmarks/{name}" in said


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_explains_itself(verb):
    done = CliRunner().invoke(app, [verb, "--help"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"sparity {verb}" in done.stdout or f" {verb} " in done.stdout
