"""A sweep from beginning to end: what it leaves, and what happens to combinations that fail."""

import json
import os

import pytest
import torch

import sparity
from interruptions import contents
from sparity.calibration.text import read_documents
from sparity.errors import InvalidInput, NumericalError, SparityError
from sparity.pipeline.studies import sweeping
from sparity.sweep_file import Sweep
from sweeps import executed

SPARSITY = "stages.0.prune.sparsity"
FILES = ["sweep.csv", "sweep.html", "sweep.json"]


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
        "sparity.pipeline.run.tokens.read_documents",
        lambda text, *rest: read.append(text) or read_documents(text, *rest),
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
    with pytest.raises(InvalidInput, match="resume needs the output folder of"):
        sparity.sweep(plan, resume=True)


def test_the_dense_model_is_never_replaced(plan, tiny_llama_folder):
    before = contents(tiny_llama_folder)
    for output in (tiny_llama_folder, tiny_llama_folder.parent):
        with pytest.raises(InvalidInput, match="the dense model lies there and would be lost"):
            sparity.sweep(plan, output=output, force=True)
    assert contents(tiny_llama_folder) == before
