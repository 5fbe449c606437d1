"""A run with thresholds that is killed at any moment resumes to the same files, those for run time among them."""

import pytest

import sparity
from interruptions import Killed, contents, dies_at
from sparity.recipe import Recipe

DATA = "sparity-dynamic/01-activations.safetensors"


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_killed_before_every_single_rename(tiny_llama_folder, token_files, tmp_path, layout):
    recipe = Recipe.read(
        {
            "model": str(tiny_llama_folder),
            "dtype": "bfloat16",
            "calibration": {"tokens": token_files["calibration"], "batch": 4},
            "stages": [{"prune": {"pattern": "2:4"}}, {"activations": {"sparsity": 0.5}}],
            "measure": {"speed": None},
            "output": {"format": layout},
        }
    )
    whole = contents(sparity.run(recipe, output=tmp_path / "whole").path)
    told = {"README.md", "report.html", "sparity.json"}  # with times in them
    expected = {name: digest for name, digest in whole.items() if name not in told}
    assert DATA in expected
    died = 0
    for count in range(1, 100):
        output = tmp_path / f"killed-{count}"
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
            try:
                sparity.run(recipe, output=output)
                break  # fewer renames than that: the run went through
            except Killed:
                died += 1
        assert not output.exists()
        found = contents(sparity.run(recipe, output=output, resume=True).path)
        assert {name: digest for name, digest in found.items() if name not in told} == expected
        assert found.keys() == whole.keys()
    assert died >= 2 + 3 * 3 + 5  # per block its shard, its thresholds and its progress


def test_a_damaged_record_of_thresholds_stops_the_run(tiny_llama_folder, token_files, tmp_path):
    recipe = {
        "model": str(tiny_llama_folder),
        "calibration": {"tokens": token_files["calibration"], "batch": 4},
        "stages": [{"activations": {}}],
        "measure": {"speed": None},
    }
    with pytest.MonkeyPatch.context() as patch:
        dies_at(11, patch)
        with pytest.raises(Killed):
            sparity.run(recipe, output=tmp_path / "out")
    fitted = sorted((tmp_path / "out.partial" / ".sparity").glob("fitted-0-*.safetensors"))
    assert fitted
    fitted[0].write_bytes(fitted[0].read_bytes()[:20])
    with pytest.raises(sparity.SparityError, match=r"fitted-0-0.safetensors is missing or damaged"):
        sparity.run(recipe, output=tmp_path / "out", resume=True)
