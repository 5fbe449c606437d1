"""Ctrl-C: the command that is printed continues the run and ends in the same bits as a run that nobody stopped."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparity.cli.running import resume_command

# The command line, waiting after the second block until it is interrupted.
WAITING = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
from sparity.pipeline.run.run_folder import RunFolder
commit = RunFolder.commit

def wait(self, blocks, hidden, record):
    commit(self, blocks, hidden, record)
    if blocks == 2:
        print("two blocks are finished", flush=True)
        time.sleep(60)

RunFolder.commit = wait
from sparity.cli.main import main
main()
"""


def weights(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_an_interrupted_command_prints_the_one_that_resumes(sparity, recipe_file, tmp_path):
    recipe = recipe_file({"solver": "sparsegpt"}, measure={"speed": None})
    assert sparity("run", recipe, "-o", tmp_path / "whole").code == 0
    old = tmp_path / "out of a thesis"
    old.mkdir()
    (old / "thesis.txt").write_text("the only copy")
    arguments = ["run", str(recipe), "stages.0.prune.sparsity=0.5", "-o", str(old), "--force", "--quiet"]
    tools = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "two blocks are finished\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    first, second = said.splitlines()
    assert first == "interrupted; finished blocks are kept."
    assert os.listdir(old) == ["thesis.txt"]
    progress = old.with_name(f"{old.name}.partial") / ".sparity" / "progress.json"
    before = json.loads(progress.read_text())
    assert before["blocks"] == 2
    command = second.removeprefix("continue with: ")
    assert command == f"sparity run --resume {recipe} stages.0.prune.sparsity=0.5 -o '{old}' --force --quiet"
    if not (tools / "sparity").exists():
        pytest.skip(f"no command sparity in {tools}: the package is not installed")
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert weights(old) == weights(tmp_path / "whole")
    assert not (old / "thesis.txt").exists()
    record = json.loads((old / "sparity.json").read_text())["report"]["candidates"][0]["effort"]
    assert record["seconds_per_block"][:2] == [entry["seconds"] for entry in before["records"]]


@pytest.mark.parametrize(
    ("given", "command"),
    [
        (["prune", "m", "-o", "my out"], "sparity prune --resume m -o 'my out'"),
        (["run", "--resume", "r.yaml", "--force"], "sparity run --resume r.yaml --force"),
        (["run", "-o", "o", "--", "r.yaml", "a=b"], "sparity run --resume -o o -- r.yaml a=b"),
    ],
)
def test_the_command_that_resumes(monkeypatch, given, command):
    monkeypatch.setattr(sys, "argv", ["sparity", *given])
    assert resume_command() == command
