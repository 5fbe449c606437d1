"""`prefer: speed`: what a fake clock says is stored, said, kept through a kill, and comes back bit for bit."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparity
from interruptions import Killed, contents, dies_at
from packed_folders import logits, same, tensors
from sparity.engine.kernels import choice, choice_file, native
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.pipeline.run.format_choices import CHOICES, dense_words
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.verify import verify

NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}")
RECIPE = {
    "dtype": "bfloat16",
    "stages": [{"prune": {"score": "magnitude"}}],
    "measure": {"speed": None},
}


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A function that sets how long the formats take; small matrices are timed too."""
    monkeypatch.setenv("SPARITY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPARITY_CHOICE", "timed")
    monkeypatch.setattr(choice, "SMALL", 0)

    def says(seconds):
        def timer(calls):
            return {name: seconds(name, call) for name, call in calls.items()}

        monkeypatch.setattr(choice_file, "_known", {})
        (tmp_path / "cache" / "kernels.json").unlink(missing_ok=True)
        monkeypatch.setattr(choice, "measure", timer)

    return says


def dense_when_wide(name, call):
    """Dense wins for the matrices with 64 columns, the others are faster in bitmask."""
    if name not in ("dense", "bitmask"):
        return 1.0
    columns = call.args[0].shape[1]
    return 2.0 if (name == "dense") != (columns == 64) else 1.0


@pytest.fixture
def plain(family_models, tmp_path):
    return sparity.run(RECIPE, model=family_models["llama"], output=tmp_path / "plain", device="cpu").path


def held(folder):
    """Stored name -> format of each linear weight."""
    decoder = Decoder.open(folder)
    matrices = decoder.source.matrices
    return {
        name: matrices[name].entry["format"] if name in matrices else "ordinary" for name in decoder.linear_weights()
    }


@NATIVE
@pytest.mark.parametrize(("values", "dense"), [("same", "ordinary"), ("int8", "dense")])
def test_what_wins_is_stored_and_comes_back(plain, tmp_path, clock, values, dense):
    clock(dense_when_wide)
    convert(plain, tmp_path / "packed", values, prefer="speed")
    shapes = Decoder.open(plain).source.shapes()
    wanted = {name: dense if shapes[name][1] == 64 else "bitmask" for name in held(tmp_path / "packed")}
    assert held(tmp_path / "packed") == wanted
    assert set(wanted.values()) == {dense, "bitmask"}
    convert(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back" / CHOICES).exists()
    assert same(tensors(tmp_path / "packed"), tensors(tmp_path / "back"))
    if values == "same":
        assert same(tensors(plain), tensors(tmp_path / "back"))
    assert verify(tmp_path / "packed").problems == verify(tmp_path / "back").problems == ()
    loaded, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("packed", "back"))
    reference = logits(expected)
    assert float((logits(loaded) - reference).abs().max()) <= 0.05 * float(reference.abs().max())


@NATIVE
def test_what_is_said(plain, tmp_path, clock):
    clock(dense_when_wide)
    convert(plain, tmp_path / "packed", prefer="speed")
    wide = list(held(tmp_path / "packed").values()).count("ordinary")
    total = len(held(tmp_path / "packed"))
    assert dense_words(tmp_path / "packed") == (
        f"chosen for speed, {wide} of {total} matrices stored dense: faster where they were packed ({wide})"
    )
    content = json.loads((tmp_path / "packed" / CHOICES).read_text())
    assert content["machine"] == choice_file.machine()
    assert sorted(name for case in content["cases"] for name in case["weights"]) == sorted(held(tmp_path / "packed"))
    (case,) = [case for case in content["cases"] if (case["rows"], case["columns"]) == (32, 64)]
    assert case["winner"] == "dense"
    assert case["how"] == "timed"
    lost = {candidate["name"]: (candidate["seconds"], candidate["lost"]) for candidate in case["candidates"]}
    assert lost["dense"] == (1.0, None)
    assert lost["bitmask"] == (2.0, "2.00x the time")
    assert lost["two_of_four"] == (None, "cannot hold this mask")


@NATIVE
def test_a_case_is_timed_once_for_all_its_matrices(plain, tmp_path, clock):
    asked = []

    def seconds(name, call):
        asked.append(name)
        return 1.0

    clock(seconds)
    convert(plain, tmp_path / "packed", prefer="speed")
    content = json.loads((tmp_path / "packed" / CHOICES).read_text())
    assert asked.count("bitmask") == len(content["cases"]) < len(held(tmp_path / "packed"))
    assert set(held(tmp_path / "packed").values()) == {"ordinary"}  # nothing wins over dense


@NATIVE
def test_a_run_says_so_in_its_report(family_models, tmp_path, clock):
    clock(dense_when_wide)
    recipe = {**RECIPE, "output": {"format": "packed", "prefer": "speed"}}
    folder = sparity.run(recipe, model=family_models["llama"], output=tmp_path / "out", device="cpu").path
    record = json.loads((folder / "sparity.json").read_text())
    note = record["report"]["candidates"][0]["notes"][0]
    assert "matrices as bitmask, multiplied by compiled kernels; chosen for speed, " in note
    assert "stored dense: faster where they were packed" in note
    assert CHOICES in record["files"]
    assert record["identity"]["recipe"]["output"]["prefer"] == "speed"
    assert verify(folder).problems == ()


def test_without_a_kernel_all_are_dense_and_the_reason_is_said(family_models, tmp_path, clock):
    clock(lambda name, call: pytest.fail("nothing to time"))
    recipe = {**RECIPE, "dtype": "float32", "output": {"format": "packed", "prefer": "speed"}}
    result = sparity.run(recipe, model=family_models["llama"], output=tmp_path / "out", device="cpu")
    assert set(held(result.path).values()) == {"ordinary"}
    note = result.report.candidates[0].notes[0]
    reason = native.unavailable() or "kernels take bfloat16, not float32"
    assert f"all matrices are dense; chosen for speed, 21 of 21 matrices stored dense: {reason} (21)" in note


def test_a_run_that_is_killed_while_it_packs_for_speed(tiny_llama_folder, tmp_path):
    """By the rules, so that both runs choose alike."""
    recipe = {**RECIPE, "model": str(tiny_llama_folder), "output": {"format": "packed", "prefer": "speed"}}
    whole = contents(sparity.run(recipe, output=tmp_path / "whole").path)
    for count in range(8, 100, 4):
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
            try:
                sparity.run(recipe, output=tmp_path / str(count))
                break
            except Killed:
                pass
        found = contents(sparity.run(recipe, output=tmp_path / str(count), resume=True).path)
        assert found.keys() == whole.keys()
        assert found[CHOICES] == whole[CHOICES]
    assert count > 13


def test_what_is_refused(plain, tmp_path):
    convert(plain, tmp_path / "packed", prefer="speed")
    with pytest.raises(InvalidInput, match="convert it to plain first, then pack it with prefer speed"):
        convert(tmp_path / "packed", tmp_path / "again", prefer="speed")
    with pytest.raises(InvalidInput, match="`prefer: speed` needs `format: packed`"):
        sparity.Recipe.read({**RECIPE, "output": {"prefer": "speed"}})
    with pytest.raises(InvalidInput, match=r"output\.prefer: .*'memory' or 'speed'"):
        sparity.Recipe.read({**RECIPE, "output": {"format": "packed", "prefer": "size"}})


def test_memory_writes_no_choices(plain, tmp_path):
    convert(plain, tmp_path / "packed")
    assert not (tmp_path / "packed" / CHOICES).exists()
    assert dense_words(tmp_path / "packed") == ""
    assert torch.equal(*(tensors(folder)["lm_head.weight"] for folder in (plain, tmp_path / "packed")))
