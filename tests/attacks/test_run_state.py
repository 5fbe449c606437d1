"""Unfinished runs: continued only when asked, by the same recipe, from undamaged state, by one process."""

import json
import os
import subprocess
import sys

import pytest

import sparity
from interruptions import contents, weight_files
from sparity.errors import CorruptFile, RunConflict


def test_an_unfinished_run_is_neither_lost_nor_continued_unasked(solving, stopped):
    before = contents(stopped)
    with pytest.raises(RunConflict, match="holds an unfinished run: continue it with --resume or start over with --fo"):
        sparity.run(solving, output=stopped.with_name("out"))
    assert contents(stopped) == before


def test_an_unfinished_run_of_another_recipe(solving, stopped, recipe, token_files):
    before = contents(stopped)
    others = {
        r"recipe\.stages": recipe({"solver": "sparsegpt", "sparsity": 0.25}),
        r"recipe\.measure\.layer_loss": {**solving, "measure": {"speed": None, "layer_loss": True}},
        r"dtype, recipe\.dtype": {**solving, "dtype": "bfloat16"},
    }
    for place, other in others.items():
        words = rf"an unfinished run of another recipe \(different: {place}\): choose another output, or start over"
        with pytest.raises(RunConflict, match=words):
            sparity.run(other, output=stopped.with_name("out"), resume=True)
    assert contents(stopped) == before


def test_a_finished_run_resumes_to_the_same_bits(solving, stopped, tmp_path):
    whole = sparity.run(solving, output=tmp_path / "whole").path
    assert weight_files(sparity.run(solving, output=tmp_path / "out", resume=True).path) == weight_files(whole)
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_what_a_killed_process_was_writing_is_not_published(solving, stopped, tmp_path):
    """A kill in the middle of a safetensors file leaves it under a random name of that library's own."""
    (stopped / ".tmpA1b2C3").write_bytes(b"half a shard")
    (stopped / ".sparity" / ".tmpA1b2C3").write_bytes(b"half a file")
    path = sparity.run(solving, output=tmp_path / "out", resume=True).path
    assert [name for name in os.listdir(path) if name.startswith(".")] == []


def damage(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


PROGRESS, MANIFEST, HIDDEN = "progress.json", "manifest.json", "hidden-0.bin"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (PROGRESS, lambda path: path.write_text("{")),
        (PROGRESS, lambda path: path.write_bytes(b"\xff")),
        (PROGRESS, lambda path: path.write_text("[]")),
        (PROGRESS, lambda path: path.write_text("{}")),
        (PROGRESS, lambda path: damage(path, lambda content: content.update(blocks=3))),
        (PROGRESS, lambda path: damage(path, lambda content: content.update(blocks="2"))),
        (PROGRESS, lambda path: damage(path, lambda content: content.update(records=[{}, {}]))),
        (PROGRESS, lambda path: damage(path, lambda content: content.update(hidden="../../../etc/passwd"))),
        (PROGRESS, lambda path: damage(path, lambda content: content["records"][0]["changes"][0].pop("name"))),
        (MANIFEST, lambda path: path.write_text("")),
        (MANIFEST, lambda path: path.write_text("5")),
        (MANIFEST, lambda path: path.write_text("{}")),
        (MANIFEST, lambda path: damage(path, lambda content: content.update(threads="many"))),
        (MANIFEST, lambda path: damage(path, lambda content: content.update(threads=0))),
        (HIDDEN, lambda path: path.unlink()),
        (HIDDEN, lambda path: path.write_bytes(path.read_bytes()[:-9])),
        (HIDDEN, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f")),
    ],
)  # fmt: skip
def test_damaged_state_is_noticed(solving, stopped, tmp_path, name, change):
    change(stopped / ".sparity" / name)
    before = weight_files(stopped)
    with pytest.raises(CorruptFile, match=r"damaged.*start again with --force"):
        sparity.run(solving, output=tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()
    assert weight_files(stopped).keys() >= {key for key in before if "model" in key}
    sparity.run(solving, output=tmp_path / "out", force=True)


@pytest.mark.parametrize("change", [os.unlink, lambda path: os.truncate(path, 100)])
def test_a_finished_shard_that_is_lost(solving, stopped, tmp_path, change):
    change(stopped / "model-00002-of-00004.safetensors")
    with pytest.raises(
        CorruptFile, match=r"a finished shard of the run is lost .*model-00002.*start again with --force"
    ):
        sparity.run(solving, output=tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


HOLDER = """
import sys
from pathlib import Path
from sparity.files import lock, make_folder
folder = Path(sys.argv[1])
make_folder(folder)
with lock(folder / "lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_in_one_folder_at_once(solving, stopped, tmp_path):
    before = contents(stopped)
    command = [sys.executable, "-c", HOLDER, str(stopped / ".sparity")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        for arguments in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(RunConflict, match=f"another run is writing to {stopped}: wait for it to end or choose"):
                sparity.run(solving, output=tmp_path / "out", **arguments)
        assert contents(stopped) == before
        process.kill()
    sparity.run(solving, output=tmp_path / "out", resume=True)  # the kernel dropped the lock of the killed process
