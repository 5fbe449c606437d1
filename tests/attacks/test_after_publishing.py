"""A process that is stopped after its result is there has finished it; one that did nothing leaves nothing."""

import logging
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

import sparity
from interruptions import Killed, contents
from orphaned_folders import orphan
from sparity.errors import CorruptFile, InvalidInput, RunConflict, SparityError
from sparity.pipeline.run import run_folder
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.run_folder import STATE, RunFolder

MOMENTS = ("before its state is renamed", "before anything is removed", "in between", "before the folder goes")


def dies(moment, patch, output):
    """The process ends while the state of a published run is removed, from `output` at the first moment."""
    rename = run_folder.Path.rename

    def stop_renaming(self, target):
        if self.name == STATE and self.parent.name == output:
            raise Killed
        return rename(self, target)

    def stop_removing(folder):
        entries = sorted(run_folder.Path(folder).iterdir(), key=lambda entry: entry.name != "manifest.json")
        gone = {MOMENTS[1]: 0, MOMENTS[2]: 1, MOMENTS[3]: len(entries)}[moment]
        for entry in entries[:gone]:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        raise Killed

    if moment == MOMENTS[0]:
        patch.setattr(run_folder.Path, "rename", stop_renaming)
    else:
        patch.setattr(run_folder.shutil, "rmtree", stop_removing)


def ends(moment, work, output="out"):
    with pytest.MonkeyPatch.context() as patch:
        dies(moment, patch, output)
        with pytest.raises(Killed):
            work()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_conversion_is_finished(tiny_llama_folder, tmp_path, caplog, moment):
    convert(tiny_llama_folder, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    ends(moment, lambda: convert(tiny_llama_folder, tmp_path / "out"))
    assert list((tmp_path / "out").glob(f"{STATE}*"))
    with pytest.raises(RunConflict, match="exists already"):  # it is not this conversion's
        convert(tiny_llama_folder, tmp_path / "out", values="int8")
    with caplog.at_level(logging.WARNING):
        assert convert(tiny_llama_folder, tmp_path / "out") == "packed"
    assert "out is finished: the process that made it was stopped while it cleaned up" in caplog.text
    assert contents(tmp_path / "out") == expected
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    with pytest.raises(RunConflict, match="exists already"):
        convert(tiny_llama_folder, tmp_path / "out")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_is_finished(solving, tmp_path, moment):
    ends(moment, lambda: sparity.run(solving, output=tmp_path / "out"))
    before = {name: digest for name, digest in contents(tmp_path / "out").items() if not name.startswith(STATE)}
    for arguments in ({}, {"resume": True, "model": "zoo:llama"}):
        with pytest.raises(SparityError):
            sparity.run(solving, output=tmp_path / "out", **arguments)
    done = sparity.run(solving, output=tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"]
    assert done.report.candidates[0].sparsity == pytest.approx(0.5, abs=0.01)
    assert done.accepted
    assert done.model().num_parameters() == done.report.parameters


def test_one_with_force_is_finished_too_and_its_predecessor_gone(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("replaced on purpose")
    ends(MOMENTS[0], lambda: sparity.run(recipe(), output=tmp_path / "out", force=True))
    assert (tmp_path / "out" / STATE / "replaced" / "old.txt").exists()
    before = (tmp_path / "out" / "sparity.json").stat().st_mtime_ns
    sparity.run(recipe(), output=tmp_path / "out", resume=True, force=True)
    assert (tmp_path / "out" / "sparity.json").stat().st_mtime_ns == before
    assert not list(tmp_path.rglob("old.txt"))


def test_a_sensitivity_and_a_sweep_are_finished(recipe, token_files, tmp_path):
    measured = {"perplexity": [{"tokens": token_files["text"]}], "window": 16, "windows": 2, "speed": None}
    given = recipe({"score": "magnitude"}, measure=measured)
    sweep = {"base": given, "vary": {"stages.0.prune.sparsity": [0.25, 0.5]}}
    for name, work in (
        ("sensitivity", lambda **more: sparity.sensitivity(given, [0.5], output=tmp_path / "sensitivity", **more)),
        ("sweep", lambda **more: sparity.sweep(sweep, output=tmp_path / "sweep", **more)),
    ):
        ends(MOMENTS[0], work, name)
        written = (tmp_path / name / f"{name}.json").read_text()
        done = work(resume=True)
        assert not (tmp_path / name / STATE).exists()
        assert (tmp_path / name / f"{name}.json").read_text() == written
        assert run_folder.json.loads(written) == done.report.to_dict()


def test_a_run_of_a_sweep_that_is_finished_is_not_done_again(recipe, tmp_path, monkeypatch):
    sweep = {"base": recipe({"score": "magnitude"}), "vary": {"stages.0.prune.sparsity": [0.25, 0.5]}}
    ends(MOMENTS[0], lambda: sparity.sweep(sweep, output=tmp_path / "sweep"), "run-1")
    commit, blocks = RunFolder.commit, []
    monkeypatch.setattr(RunFolder, "commit", lambda self, n, *rest: blocks.append(n) or commit(self, n, *rest))
    done = sparity.sweep(sweep, output=tmp_path / "sweep", resume=True)
    assert blocks == [1, 2, 3]
    assert [round(row.sparsity, 2) for row in done.report.rows] == [0.25, 0.5]


def test_a_state_that_is_damaged_finishes_nothing(tiny_llama_folder, tmp_path):
    ends(MOMENTS[0], lambda: convert(tiny_llama_folder, tmp_path / "out"))
    (tmp_path / "out" / STATE / "manifest.json").write_text("{")
    before = contents(tmp_path / "out")
    with pytest.raises(RunConflict, match="exists already"):
        convert(tiny_llama_folder, tmp_path / "out")
    assert contents(tmp_path / "out") == before


# ---- nothing is left of what did nothing


def lacking(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncated(folder):
    os.truncate(folder / "model.safetensors", 1000)


def full_mask(folder, name):
    """A bitmask that keeps more than is stored."""
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    tensors[f"{name}.bitmask"].view(-1)[0] = 255
    tensors[f"{name}.compressed"] = tensors[f"{name}.compressed"][:-9].clone()
    save_file(tensors, shard, {"format": "pt"})


@pytest.mark.parametrize("damage", [lacking, truncated], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("target", ["out", "new/deep/out"])
def test_a_refused_conversion_leaves_nothing(model_copy, tmp_path, damage, target):
    sound = shutil.copytree(model_copy, tmp_path / "sound")
    damage(model_copy)
    for _ in range(2):  # the second is not told of an unfinished run
        with pytest.raises(CorruptFile):
            convert(model_copy, tmp_path / target)
        assert sorted(os.listdir(tmp_path)) == ["model", "sound"]
    assert convert(sound, tmp_path / target) == "packed"


def test_a_conversion_that_finds_damage_half_way_leaves_nothing(tiny_llama_folder, tmp_path):
    """It starts anew each time, so that what it wrote is of no use."""
    folder = orphan(tiny_llama_folder, tmp_path / "old", "sparse-bitmask")
    sound = shutil.copytree(folder, tmp_path / "sound")
    full_mask(folder, "model.layers.2.mlp.up_proj")
    for target in ("out", "new/deep/out"):
        for _ in range(2):
            with pytest.raises(CorruptFile, match="it keeps"):
                convert(folder, tmp_path / target)
            assert sorted(os.listdir(tmp_path)) == ["old", "sound"]
    assert convert(sound, tmp_path / "out") == "packed"


def test_a_run_that_cannot_begin_leaves_nothing(recipe, tmp_path, monkeypatch):
    def fail(*_):
        raise InvalidInput("no")

    monkeypatch.setattr("sparity.pipeline.run.runner._passes", fail)
    with pytest.raises(InvalidInput):
        sparity.run(recipe(), output=tmp_path / "new" / "out")
    assert not os.listdir(tmp_path)


def test_files_of_something_else_get_no_state(tiny_llama_folder, tmp_path):
    other = tmp_path / "out.partial"
    other.mkdir()
    (other / "thesis.txt").write_text("the only copy")
    with pytest.raises(RunConflict, match="holds files of something else"):
        convert(tiny_llama_folder, tmp_path / "out")
    assert os.listdir(other) == ["thesis.txt"]


def test_a_complete_conversion_that_could_not_get_its_name_stays(tiny_llama_folder, tmp_path, monkeypatch):
    publish = RunFolder.publish

    def appear(self):
        (tmp_path / "out").mkdir()
        publish(self)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "publish", appear)
        with pytest.raises(RunConflict, match="exists already"):
            convert(tiny_llama_folder, tmp_path / "out")
    assert (tmp_path / "out.partial" / "sparity.safetensors.index.json").is_file()


def test_an_unfinished_run_of_others_is_not_removed(solving, stopped, tmp_path):
    before = contents(stopped)
    with pytest.raises(RunConflict, match="unfinished run"):
        sparity.run({**solving, "stages": [{"prune": {"score": "magnitude"}}]}, output=tmp_path / "out")
    assert contents(stopped) == before
