"""A sweep from beginning to end: what it leaves, and that it goes on where it was stopped."""

import json
import os
from dataclasses import replace

import pytest
import torch

import sparity
from interruptions import Killed, contents, dies_at
from sparity.calibration.text import read_documents
from sparity.errors import InvalidInput, NumericalError, RunConflict, SparityError
from sparity.files import write_json
from sparity.pipeline import sweeping
from sparity.pipeline.folder import RunFolder
from sparity.pipeline.runner import execute
from sparity.sweep_file import Sweep

SPARSITY = "stages.0.prune.sparsity"
FILES = ["sweep.csv", "sweep.html", "sweep.json"]


@pytest.fixture
def plan(tiny_llama_folder, token_files):
    """Magnitude and Wanda at two sparsities, measured on one text."""
    return {
        "base": {
            "model": str(tiny_llama_folder),
            "calibration": {"tokens": token_files["calibration"], "batch": 3},
            "stages": [{"prune": {}}],
            "measure": {"perplexity": [token_files["text"]], "window": 32, "windows": 2},
        },
        "vary": {
            "method": {"magnitude": {"stages.0.prune.score": "magnitude"}, "wanda": {"stages.0.prune.score": "wanda"}},
            SPARSITY: [0.25, 0.5],
        },
    }


@pytest.fixture
def small(plan):
    """Two combinations, one of which carries hidden states from block to block."""
    vary = {
        "method": {
            "magnitude": {"stages.0.prune.score": "magnitude"},
            "sparsegpt": {"stages.0.prune.solver": "sparsegpt"},
        }
    }
    return {**plan, "vary": vary}


def measured(result):
    """What a sweep found, without what the machine and the clock say."""
    return [replace(row, seconds=None, peak_memory=None) for row in result.report.rows]


def executed(monkeypatch):
    """The combinations that are run from here on, by their sparsity and score."""
    ran = []

    def watch(recipe, *arguments, **named):
        prune = recipe.stages[0].prune
        ran.append((prune.score or prune.solver, prune.sparsity))
        return execute(recipe, *arguments, **named)

    monkeypatch.setattr(sweeping, "execute", watch)
    return ran


def test_every_row_is_what_a_run_by_itself_measures(plan, tmp_path, monkeypatch):
    ran = executed(monkeypatch)
    result = sparity.sweep(plan, output=tmp_path / "out", device="cpu")
    assert result.path == tmp_path / "out"
    assert ran == [("magnitude", 0.25), ("magnitude", 0.5), ("wanda", 0.25), ("wanda", 0.5)]
    assert sorted(os.listdir(tmp_path / "out")) == FILES  # no weights
    assert os.listdir(tmp_path) == ["out"]
    rows = result.report.rows
    assert [row.labels for row in rows] == [(m, s) for m in ("magnitude", "wanda") for s in ("0.25", "0.5")]
    for row, combination in zip(rows, Sweep.read(plan).combinations, strict=True):
        alone = sparity.run(combination.recipe, device="cpu").report.candidates[0]
        assert (row.quality, row.sparsity, row.target) == (alone.quality, alone.sparsity, alone.target)
        assert (row.method, row.decode_ratio, row.message) == (alone.name, None, None)
        assert row.recipe == combination.recipe.summary()
        assert row.peak_memory > row.seconds > 0
    assert [round(row.sparsity, 2) for row in rows] == [0.25, 0.5, 0.25, 0.5]
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert content == result.report.to_dict()
    assert content["base"]["measure"]["window"] == 32
    assert (tmp_path / "out" / "sweep.csv").read_bytes() == result.report.to_csv().encode()
    assert "magnitude, 0.25" not in (tmp_path / "out" / "sweep.html").read_text()  # lines are named by the other axes
    assert "<title>magnitude, sparsity 0.25" in (tmp_path / "out" / "sweep.html").read_text()


def test_killed_before_every_single_rename(small, tmp_path):
    expected = measured(sparity.sweep(small, output=tmp_path / "whole"))
    died = 0
    for count in range(1, 200):
        output = tmp_path / f"killed-{count}"
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
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
    # the sweep's manifest and three files, per run a manifest, 4 shards and 3 records at least, per combination a row
    assert died >= 4 + 2 * (8 + 1)


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


def test_one_combination_fails_and_the_others_go_on(plan, tmp_path, monkeypatch):
    ran = executed(monkeypatch)
    watched = sweeping.execute

    def fail(recipe, *arguments, **named):
        result = watched(recipe, *arguments, **named)
        if ran[-1] == ("magnitude", 0.5):
            raise NumericalError("model.layers.0: a sum\nis NaN")
        if ran[-1] == ("wanda", 0.25):
            raise torch.OutOfMemoryError("tried to allocate 3 GB")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "execute", fail)
        result = sparity.sweep(plan, output=tmp_path / "out")
    rows = result.report.rows
    assert [row.message for row in rows] == [
        None, "model.layers.0: a sum is NaN", "out of memory: tried to allocate 3 GB", None,
    ]  # fmt: skip
    assert [row.words for row in result.report.failed] == ["magnitude, 0.5", "wanda, 0.25"]
    assert (rows[1].quality, rows[1].sparsity, rows[3].quality != ()) == ((), None, True)
    assert sorted(os.listdir(tmp_path / "out")) == FILES
    assert "magnitude, 0.5 failed:" in (tmp_path / "out" / "sweep.html").read_text()


def test_what_would_end_every_combination_ends_the_sweep_and_is_resumed(plan, tmp_path, monkeypatch):
    ran = executed(monkeypatch)
    watched = sweeping.execute

    def full(recipe, *arguments, **named):
        if len(ran) == 2:
            raise SparityError("the disk is full")
        return watched(recipe, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "execute", full)
        with pytest.raises(SparityError, match="the disk is full"):
            sparity.sweep(plan, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = sparity.sweep(plan, output=tmp_path / "out", resume=True)
    assert ran == [("magnitude", 0.25), ("magnitude", 0.5), ("wanda", 0.25), ("wanda", 0.5)]
    assert not result.report.failed


def test_a_failed_combination_is_tried_again_by_resume(plan, tmp_path, monkeypatch):
    def fail(recipe, *_, **__):
        if recipe.stages[0].prune.score == "wanda":
            raise Killed
        raise NumericalError("for once")

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "execute", fail)
        with pytest.raises(Killed):
            sparity.sweep(plan, output=tmp_path / "out")
    result = sparity.sweep(plan, output=tmp_path / "out", resume=True)
    assert not result.report.failed


def test_everything_is_checked_before_the_first_run(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping, "execute", lambda *_, **__: pytest.fail("work before the check"))
    wrong = {**plan, "vary": {**plan["vary"], SPARSITY: [0.25, 1.5]}}
    with pytest.raises(InvalidInput, match=r'^combination "magnitude, 1\.5": sparsity 1\.5: it is the share'):
        sparity.sweep(wrong, output=tmp_path / "out")
    text = {**plan, "vary": {"calibration.tokens": {"there": {}, "none": {"calibration.tokens": "none.npy"}}}}
    with pytest.raises(InvalidInput, match=r'^combination "none": token file none\.npy does not exist'):
        sparity.sweep(text, output=tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_text_is_tokenised_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        "sparity.pipeline.texts.read_documents", lambda text, *rest: read.append(text) or read_documents(text, *rest)
    )
    plan = {
        "base": {
            "model": "zoo:llama",
            "calibration": {"text": "python-docs:calibration", "documents": "joined", "samples": 1, "length": 8},
            "stages": [{"prune": {"score": "wanda"}}],
            "measure": {"perplexity": ["python-docs:held-out"], "window": 8, "windows": 1},
        },
        "vary": {"calibration.seed": [0, 1]},
    }
    first, second = sparity.sweep(plan, output=tmp_path / "out").report.rows
    assert read == ["python-docs:calibration", "python-docs:held-out", "python-docs:calibration"]  # two seeds
    assert first.quality != second.quality
    sparity.run(plan["base"])
    assert len(read) == 5  # nothing is remembered behind the sweep


def test_a_model_in_memory_and_a_result_without_an_output(plan, family_models):
    before = {name: tensor.clone() for name, tensor in family_models["llama"].state_dict().items()}
    result = sparity.sweep(plan, model=family_models["llama"])
    assert {row.model for row in result.report.rows} == {type(family_models["llama"]).__name__}
    assert sorted(os.listdir(result.path)) == FILES
    assert all(torch.equal(tensor, before[name]) for name, tensor in family_models["llama"].state_dict().items())
    path = result.path
    del result
    assert not path.exists()
    with pytest.raises(InvalidInput, match="resume needs the output folder of the sweep"):
        sparity.sweep(plan, resume=True)


def test_the_dense_model_is_never_replaced(plan, tiny_llama_folder):
    before = contents(tiny_llama_folder)
    for output in (tiny_llama_folder, tiny_llama_folder.parent):
        with pytest.raises(InvalidInput, match="the dense model lies there and would be lost"):
            sparity.sweep(plan, output=output, force=True)
    assert contents(tiny_llama_folder) == before


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
