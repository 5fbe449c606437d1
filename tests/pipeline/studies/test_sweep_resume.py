"""A sweep that was stopped at any moment goes on where it was."""

import json
import os

import pytest
import torch

import sparity
from interruptions import Killed, contents, dies_at
from sparity.errors import NumericalError, RunConflict
from sparity.files import write_json
from sparity.pipeline.run.run_folder import RunFolder
from sparity.pipeline.run.runner import execute
from sparity.pipeline.studies import sweeping
from sweeps import executed, measured

SPARSITY = "stages.0.prune.sparsity"
FILES = ["sweep.csv", "sweep.html", "sweep.json"]


def of_the_sweep(path):
    """Whether a path belongs to the sweep itself; a run's are those of every run."""
    return not any(part.startswith("run-") for part in path.parts)


def test_killed_before_every_single_rename_of_its_own(small, tmp_path):
    expected = measured(sparity.sweep(small, output=tmp_path / "whole"))
    died = 0
    for count in range(1, 200):
        output = tmp_path / f"killed-{count}"
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch, of_the_sweep)
            try:
                sparity.sweep(small, output=output)
                break  # fewer renames than that: the sweep went through
            except Killed:
                died += 1
        assert not output.exists()
        resumed = sparity.sweep(small, output=output, resume=True)
        assert measured(resumed) == expected
        assert sorted(os.listdir(output)) == FILES
        assert not output.with_name(f"{output.name}.partial").exists()
    assert died >= 4 + 2  # the manifest and three files, per combination a row


def test_finished_combinations_are_not_run_again(plan, tmp_path, monkeypatch):
    remember = RunFolder.remember

    def stop(self, name, value):
        remember(self, name, value)
        if name == "combination-2":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "remember", stop)
        with pytest.raises(Killed):
            sparity.sweep(plan, output=tmp_path / "out")
    state = tmp_path / "out.partial" / ".sparity"
    assert {p.name for p in state.iterdir()} >= {"combination-1.json", "combination-2.json", "run-2"}
    assert not (state / "run-1").exists()  # deleted when its row was kept
    ran = executed(monkeypatch)
    first = json.loads((state / "combination-1.json").read_text())
    result = sparity.sweep(plan, output=tmp_path / "out", resume=True)
    assert ran == [("wanda", 0.25), ("wanda", 0.5)]
    assert result.report.rows[0].seconds == first["seconds"]
    assert sorted(os.listdir(tmp_path / "out")) == FILES


def stopped_within_a_run(small, tmp_path):
    """A sweep that ended with two of three blocks of its second combination finished."""
    commit = RunFolder.commit

    def stop(self, blocks, hidden, record):
        commit(self, blocks, hidden, record)
        if blocks == 2 and self.output.name == "run-2":
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "commit", stop)
        with pytest.raises(Killed):
            sparity.sweep(small, output=tmp_path / "out")
    return tmp_path / "out.partial" / ".sparity" / "run-2.partial" / ".sparity" / "progress.json"


def test_an_unfinished_combination_is_continued(small, tmp_path, monkeypatch):
    progress = stopped_within_a_run(small, tmp_path)
    assert json.loads(progress.read_text())["blocks"] == 2
    commit, blocks = RunFolder.commit, []
    monkeypatch.setattr(RunFolder, "commit", lambda self, n, *rest: blocks.append(n) or commit(self, n, *rest))
    result = sparity.sweep(small, output=tmp_path / "out", resume=True)
    assert blocks == [3]
    assert measured(result) == measured(sparity.sweep(small))


def test_an_unfinished_combination_that_is_damaged_is_run_anew(small, tmp_path, caplog):
    progress = stopped_within_a_run(small, tmp_path)
    progress.write_text("{")
    result = sparity.sweep(small, output=tmp_path / "out", resume=True)
    assert "sparsegpt: what a stopped run left is damaged, so it is run anew" in caplog.text
    assert measured(result) == measured(sparity.sweep(small))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan["base"]["measure"].update(windows=3), r"base\.measure\.windows, read\.texts"),
        (
            lambda plan: plan["vary"].update({SPARSITY: [0.25, 0.75]}),
            rf"vary\.{SPARSITY}\.0\.5, vary\.{SPARSITY}\.0\.75",
        ),
        (lambda plan: plan["vary"]["method"].pop("wanda"), r"read\.tokens, vary\.method\.wanda"),
        (lambda plan: plan["base"]["calibration"].update(batch=2), r"base\.calibration\.batch"),
        (lambda plan: plan["base"].update(dtype="bfloat16"), r"base\.dtype, read\.dtype"),
    ],
)
def test_a_changed_sweep_is_refused_with_what_differs(plan, tmp_path, change, words):
    with pytest.MonkeyPatch.context() as patch:
        dies_at(5, patch)
        with pytest.raises(Killed):
            sparity.sweep(plan, output=tmp_path / "out")
    before = contents(tmp_path / "out.partial")
    with pytest.raises(RunConflict, match="holds an unfinished run: continue it with --resume"):
        sparity.sweep(plan, output=tmp_path / "out")
    changed = json.loads(json.dumps(plan))
    change(changed)
    with pytest.raises(RunConflict, match=rf"\(different: ({words})"):
        sparity.sweep(changed, output=tmp_path / "out", resume=True)
    assert contents(tmp_path / "out.partial") == before
    assert len(sparity.sweep(changed, output=tmp_path / "out", resume=True, force=True).report.rows) in (2, 4)


def test_a_failed_combination_is_tried_again_by_resume(plan, tmp_path, monkeypatch):
    def fail(recipe, *_, **__):
        if recipe.stages[0].score == "wanda":
            raise Killed
        raise NumericalError("for once")

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "execute", fail)
        with pytest.raises(Killed):
            sparity.sweep(plan, output=tmp_path / "out")
    result = sparity.sweep(plan, output=tmp_path / "out", resume=True)
    assert not result.report.failed


def test_the_thread_count_of_the_start_is_kept(plan, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        dies_at(20, patch)
        with pytest.raises(Killed):
            sparity.sweep(plan, output=tmp_path / "out")
    manifest = tmp_path / "out.partial" / ".sparity" / "manifest.json"
    content = json.loads(manifest.read_text())
    threads = torch.get_num_threads()
    assert content["threads"] == threads
    write_json(manifest, {**content, "threads": threads + 1})
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeping, "execute", lambda *a, **k: seen.append(torch.get_num_threads()) or execute(*a, **k))
        sparity.sweep(plan, output=tmp_path / "out", resume=True)
    assert set(seen) == {threads + 1}
    assert torch.get_num_threads() == threads
