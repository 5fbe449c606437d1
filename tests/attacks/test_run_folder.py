"""Run folders in every wrong state: nothing of value is lost, and what is finished stays finished."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import sparity
from sparity.errors import CorruptFile, InvalidInput, RunConflict, SparityError
from sparity.measure.report import Quality
from sparity.pipeline import folder as run_folder
from sparity.pipeline.folder import RunFolder
from sparity.pipeline.measuring import judge
from sparity.recipe import Accept


def contents(folder):
    """Every file below a folder with its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights(folder):
    return {name: digest for name, digest in contents(folder).items() if name.endswith(".safetensors")}


class Stop(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def solving(recipe):
    """A recipe that needs hidden states between its blocks."""
    return recipe({"solver": "sparsegpt"})


@pytest.fixture
def stopped(solving, tmp_path):
    """The working folder of a run that stopped with two of three blocks finished."""
    commit = RunFolder.commit

    def stop(self, blocks, hidden, record):
        commit(self, blocks, hidden, record)
        if blocks == 2:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "commit", stop)
        with pytest.raises(Stop):
            sparity.run(solving, output=tmp_path / "out")
    return tmp_path / "out.partial"


@pytest.fixture
def old(tmp_path):
    """An output that was there before, with nothing that Sparity wrote."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("the only copy")
    return tmp_path / "out"


def test_an_existing_output_is_not_touched(recipe, old, tmp_path):
    before = contents(old)
    for resume in (False, True):
        with pytest.raises(RunConflict, match=f"{old} exists already: choose another output or pass --force"):
            sparity.run(recipe(), output=old, resume=resume)
    assert contents(old) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_an_output_that_is_no_folder(recipe, tmp_path, kind):
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("the only copy")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunConflict, match="exists already"):
        sparity.run(recipe(), output=output)
    assert os.listdir(tmp_path) == ["out"]
    assert sparity.run(recipe(), output=output, force=True).path == output
    assert (output / "sparity.json").is_file()
    assert not output.is_symlink()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("moment", ["commit", "write_results", "publish"])
def test_force_keeps_the_old_output_until_the_new_one_is_complete(recipe, old, tmp_path, monkeypatch, moment):
    before = contents(old)

    def fail(*_):
        raise Stop

    with monkeypatch.context() as patch:
        if moment == "write_results":
            patch.setattr("sparity.pipeline.runner.write_results", fail)
        else:
            patch.setattr(RunFolder, moment, fail)
        with pytest.raises(Stop):
            sparity.run(recipe(), output=old, force=True)
    assert contents(old) == before
    sparity.run(recipe(), output=old, force=True, resume=True)
    assert not (old / "thesis.txt").exists()
    assert (old / "sparity.json").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_stopped_between_its_last_two_renames(recipe, old, tmp_path, monkeypatch):
    """The old output has been moved aside, the new one has not arrived: the next run puts the old one back."""
    before = contents(old)
    rename = run_folder.Path.rename

    def stop(self, target):
        if self.name == "out.partial":
            raise Stop
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Path, "rename", stop)
        with pytest.raises(Stop):
            sparity.run(recipe(), output=old, force=True)
    assert not old.exists()
    with pytest.raises(RunConflict, match="exists already"):
        sparity.run(recipe(), output=old, resume=True)
    assert contents(old) == before
    sparity.run(recipe(), output=old, resume=True, force=True)
    assert (old / "sparity.json").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_last_rename_that_fails(recipe, old, tmp_path, monkeypatch):
    before = contents(old)
    rename = run_folder.Path.rename

    def fail(self, target):
        if self.name == "out.partial":
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Path, "rename", fail)
        with pytest.raises(
            SparityError, match=r"out\.partial cannot be renamed to .*out: Device or resource busy; .*--res"
        ):
            sparity.run(recipe(), output=old, force=True)
    assert contents(old) == before
    sparity.run(recipe(), output=old, resume=True, force=True)
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_appears_during_the_run(recipe, tmp_path, monkeypatch):
    output = tmp_path / "out"
    publish = RunFolder.publish

    def appear(self):
        output.mkdir()
        (output / "thesis.txt").write_text("the only copy")
        publish(self)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "publish", appear)
        with pytest.raises(RunConflict, match="exists already"):
            sparity.run(recipe(), output=output)
    assert os.listdir(output) == ["thesis.txt"]
    (output / "thesis.txt").unlink()
    output.rmdir()
    sparity.run(recipe(), output=output, resume=True)
    assert (output / "sparity.json").exists()


def test_the_dense_model_is_never_replaced(recipe, model_copy):
    before = contents(model_copy)
    given = recipe(model=str(model_copy))
    for output in (model_copy, model_copy.parent, model_copy / ".." / model_copy.name):
        with pytest.raises(InvalidInput, match="the dense model lies there and would be lost; choose another output"):
            sparity.run(given, output=output, force=True)
    assert contents(model_copy) == before


def test_a_folder_of_something_else_under_the_working_name(recipe, tmp_path):
    other = tmp_path / "out.partial"
    other.mkdir()
    (other / "thesis.txt").write_text("the only copy")
    for resume in (False, True):
        with pytest.raises(RunConflict, match=rf"{other}, where the run would work, holds files of something else"):
            sparity.run(recipe(), output=tmp_path / "out", resume=resume)
    assert (other / "thesis.txt").read_text() == "the only copy"


def test_places_that_cannot_be_written(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SparityError, match=r"cannot create the folder .*file/out\.partial/\.sparity: Not a directory"):
        sparity.run(recipe(), output=tmp_path / "file" / "out")
    with pytest.raises(InvalidInput, match="output / is the root of the file system: name a folder"):
        RunFolder(Path("/"))
    with pytest.raises(InvalidInput, match="safetensors writes only to names in UTF-8"):
        sparity.run(recipe(), output=tmp_path / os.fsdecode(b"\xff"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunConflict, match=r"^\. exists already|^/.* exists already"):
        sparity.run(recipe(), output=".")
    with pytest.raises(RunConflict, match="exists already"):
        sparity.run(recipe(), output="")
    assert os.listdir(tmp_path) == ["file"]


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
    assert weights(sparity.run(solving, output=tmp_path / "out", resume=True).path) == weights(whole)
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


PROGRESS, MANIFEST, HIDDEN = "progress.json", "manifest.json", "hidden-0.safetensors"


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
        (PROGRESS, lambda path: damage(path, lambda content: content["records"][0]["layers"][0].pop("name"))),
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
    before = weights(stopped)
    with pytest.raises(CorruptFile, match=r"damaged.*start again with --force"):
        sparity.run(solving, output=tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()
    assert weights(stopped).keys() >= {key for key in before if "model" in key}
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


def test_a_resume_without_an_output(recipe):
    with pytest.raises(InvalidInput, match="resume needs the output folder of the run"):
        sparity.run(recipe(), resume=True)


MEASURED = Quality("a", 64, 100, 10.0, 10.4, 0.04, "good", 0.1, 0.9)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [((0.04,), True), ((0.04, 0.06), False), ((0.06, 0.04), False), ((0.04, float("nan")), False), ((), False)],
)
def test_every_text_must_keep_a_limit(changes, passed):
    """NaN keeps none, wherever it stands."""
    texts = tuple(replace(MEASURED, change=change, kl=change) for change in changes)
    verdicts = judge(Accept(perplexity="+5%", kl=0.05, decode="1.3x"), texts, None)
    assert [verdict.passed for verdict in verdicts] == [passed, passed, False]
    if not changes:
        assert [verdict.reached for verdict in verdicts] == ["not measured"] * 3
