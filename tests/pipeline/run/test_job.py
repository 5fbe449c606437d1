import pytest
from safetensors.torch import load_file, save_file

from sparity.budgets.base import Site, allocate
from sparity.budgets.uniform import Uniform
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Decoder
from sparity.pipeline.run.job import prepare
from sparity.recipe import Recipe, SpeedTest

STAGES = [{"prune": {"score": "magnitude"}}]


def test_the_default_speed_test_fits_a_short_context_and_an_explicit_one_is_refused(tiny_llama_folder):
    job = prepare(Recipe.read({"model": str(tiny_llama_folder), "stages": STAGES}))  # its context is 64
    assert job.recipe.measure.speed == SpeedTest(prompt=32, tokens=16, rounds=SpeedTest().rounds)
    assert SpeedTest.fitting(2048) == SpeedTest.fitting(None) == SpeedTest()
    asked = {"model": str(tiny_llama_folder), "stages": STAGES, "measure": {"speed": {"prompt": 64}}}
    with pytest.raises(InvalidInput, match="a prompt of 64 and 32 new tokens do not fit the model's context of 64"):
        prepare(Recipe.read(asked))


def test_keys_that_token_files_leave_idle_are_refused(token_files):
    calibration = {"tokens": token_files["calibration"], "samples": 5, "seed": 1}
    with pytest.raises(InvalidInput, match="calibration: `tokens` is used as it is: leave out samples, seed"):
        Recipe.read({"stages": STAGES, "calibration": calibration})


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stages:\n- prune:\n    score: wanda\n    score: obs\n")
    with pytest.raises(CorruptFile, match='the key "score" stands twice'):
        Recipe.read(path)


def test_blocks_beyond_the_configuration_are_named_and_copied(tiny_llama_folder, tmp_path, caplog):
    tensors = load_file(tiny_llama_folder / "model.safetensors")
    tensors |= {name.replace("layers.0.", "layers.3."): t.clone() for name, t in tensors.items() if "layers.0." in name}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_llama_folder / "config.json").read_text())
    decoder = Decoder.open(tmp_path)
    assert "blocks [3] of the checkpoint are not part of the configured model" in caplog.text
    assert len(decoder) == 3
    assert "model.layers.3.mlp.up_proj.weight" in decoder.rest()


def test_overrides_that_meet_the_target_by_themselves():
    sites = [Site("a", 3.0), Site("b", 7.0)]
    assert allocate(Uniform(), sites, 0.7 * 0.3, {"b": 0.3}) == {"a": 0.0, "b": 0.3}


def test_options_of_a_score_that_the_solver_computes_are_refused(tiny_llama_folder):
    prune = {"score": {"obs": {"damping": 0.5}}, "solver": "sparsegpt"}
    with pytest.raises(
        InvalidInput, match="sparsegpt computes the score obs by itself: give the options to the solver"
    ):
        prepare(Recipe.read({"model": str(tiny_llama_folder), "stages": [{"prune": prune}]}))
