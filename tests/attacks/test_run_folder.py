"""Run folders in every wrong state: nothing of value is lost, and what is finished stays finished."""

import os
from pathlib import Path

import pytest

import sparity
from interruptions import Killed, contents
from sparity.errors import InvalidInput, RunConflict, SparityError
from sparity.pipeline.run import run_folder as run_folder
from sparity.pipeline.run.run_folder import RunFolder


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
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "write_results":
            patch.setattr("sparity.pipeline.run.runner.write_results", fail)
        else:
            patch.setattr(RunFolder, moment, fail)
        with pytest.raises(Killed):
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
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Path, "rename", stop)
        with pytest.raises(Killed):
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
    with pytest.raises(InvalidInput, match="the name of the output is empty"):
        sparity.run(recipe(), output="")
    assert os.listdir(tmp_path) == ["file"]


def test_a_resume_without_an_output(recipe):
    with pytest.raises(InvalidInput, match="resume needs the output folder of"):
        sparity.run(recipe(), resume=True)
