"""Where the output of the `sparity` command goes when it cannot be written."""

import os
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "sparity"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["methods", "score"], ["schema"], ["--version"]])
def test_a_full_disk_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: cannot write the output: No space left on device"


def test_a_reader_that_went_away_is_no_error():
    with subprocess.Popen([*COMMAND, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        said = running.stderr.read()
    assert (running.returncode, said) == (1, "")


def test_what_an_encoding_lacks_is_replaced():
    script = "from sparity.cli.output import write; write('caf\u00e9')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert done.stdout == b"caf?"


@pytest.mark.parametrize("name", ["", " ", "zoo:mine"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "zoo:llama", "-o", None],
        ["run", "{recipe}", "-o", None],
        ["sensitivity", "zoo:llama", "-o", None],
        ["sweep", "{sweep}", "-o", None],
        ["bench", "zoo:llama", "-o", None],
        ["demo", "-o", None],
        ["convert", "zoo:llama", None],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_output_needs_a_name_of_its_own(sparity, recipe_file, tmp_path, monkeypatch, arguments, name):
    recipe, sweep = recipe_file(), tmp_path / "sweep.yaml"
    sweep.write_text(f'{{"base": "{recipe}", "vary": {{"stages.0.prune.sparsity": [0.5]}}}}')
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    given = [name if part is None else part.format(recipe=recipe, sweep=sweep) for part in arguments]
    done = sparity(*given)
    assert done.code == 1
    wanted = "output zoo:mine: that is a model of the zoo" if name == "zoo:mine" else "the name of the output is empty"
    assert done.err.splitlines()[-1].startswith(f"error: {wanted}")
    assert sorted(tmp_path.iterdir()) == before


def test_a_recipes_output_needs_a_name_too(sparity, recipe_file):
    done = sparity("run", recipe_file(output={"path": ""}))
    assert done.code == 1
    assert "the name of the output is empty" in done.err
