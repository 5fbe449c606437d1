"""Packed models in use: made from, saved again, copied, trained around; and what is refused."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparity
from interruptions import contents
from packed_folders import TOKENS, alone, logits
from sparity.engine.kernels import native
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Decoder
from sparity.pipeline.run.packing import convert


def test_a_plain_run_from_a_packed_model_loads_anywhere(plain, token_files, tmp_path):
    convert(plain(), tmp_path / "packed")
    recipe = {
        "calibration": {"tokens": token_files["calibration"]},
        "stages": [{"prune": {"score": "wanda", "sparsity": 0.75}}],
        "measure": {"perplexity": [token_files["text"]], "window": 16, "speed": None},
    }
    result = sparity.run(recipe, model=str(tmp_path / "packed"), output=tmp_path / "out", device="cpu")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert alone(tmp_path / "out") == "loaded"
    assert result.model()


def test_a_result_never_takes_the_place_of_its_model(plain, tmp_path):
    folder = plain()
    before = contents(folder)
    inside = tmp_path / "models" / "mine"
    inside.parent.mkdir()
    folder.rename(inside)
    for source, target in (
        (inside, inside),
        (inside, inside.parent),
        (inside, inside.with_suffix("")),
    ):
        with pytest.raises(InvalidInput, match="the dense model lies there and would be lost"):
            convert(source, target, force=True)
    partial = inside.with_name("other.partial")
    inside.rename(partial)
    with pytest.raises(InvalidInput, match="would be lost"):
        convert(partial, partial.with_name("other"), force=True)
    recipe = {"stages": [{"prune": {"score": "magnitude"}}], "measure": {"speed": None}}
    with pytest.raises(InvalidInput, match="would be lost"):
        sparity.run(recipe, model=str(partial), output=partial.with_name("other"), force=True)
    assert contents(partial) == before


def test_config_decides_between_plain_and_packed_weights_in_one_folder(plain, family_models, tmp_path):
    convert(plain(), tmp_path / "packed")
    family_models["llama"].save_pretrained(tmp_path / "packed")
    assert not Decoder.open(tmp_path / "packed").source.packed
    assert torch.equal(logits(sparity.load(tmp_path / "packed")), logits(family_models["llama"]))


def test_inner_models_are_saved_packed_too_and_other_weights_stay_behind(plain, tmp_path):
    folder = plain()
    (folder / "pytorch_model.bin").write_bytes(b"dense")
    convert(folder, tmp_path / "packed")
    assert not (tmp_path / "packed" / "pytorch_model.bin").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    model.model.save_pretrained(tmp_path / "inner")
    assert not (tmp_path / "inner" / "model.safetensors").exists()
    assert alone(tmp_path / "inner").startswith("refused:")


def test_an_index_that_forgets_a_shard_is_refused(plain, tmp_path):
    convert(plain(), tmp_path / "packed")
    path = tmp_path / "packed" / "sparity.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] = {key: home for key, home in content["weight_map"].items() if "00003" not in home}
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptFile, match="the index names 3 shards of 4"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_int8_is_recorded_as_it_is(plain, tmp_path):
    from sparity.pipeline.run.verify import verify

    folder = plain(output={"format": "packed", "values": "int8"}, name="int8")
    assert verify(folder).problems == ()
    convert(plain(name="plain"), tmp_path / "later", values="int8")
    assert verify(tmp_path / "later").problems == ()


def test_gradients_reach_what_lies_before_a_packed_layer(plain, tmp_path):
    folder = plain()
    convert(folder, tmp_path / "packed")
    slopes = []
    for path in (folder, tmp_path / "packed"):
        model = AutoModelForCausalLM.from_pretrained(path)
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        slopes.append(model.model.layers[0].input_layernorm.weight.grad.float())
    torch.testing.assert_close(slopes[1], slopes[0], rtol=0.1, atol=0.02 * float(slopes[0].abs().max()))


@pytest.mark.parametrize("device_map", ["balanced", "sequential", {"": "disk"}, {"": 0}])
def test_a_device_that_cannot_hold_packed_weights(device_map):
    from types import SimpleNamespace

    from sparity.integrations.huggingface import SparityConfig, SparityQuantizer

    quantizer = SparityQuantizer(SparityConfig(), pre_quantized=True)
    with pytest.raises(InvalidInput, match="leave device_map out"):
        quantizer.validate_environment(device_map=device_map)
    for allowed in (None, "auto", "cpu", {"": "cpu"}, torch.device("cpu")):
        quantizer.validate_environment(device_map=allowed)
    assert quantizer.update_attn_implementation(SimpleNamespace()).transformers_weights.endswith(".index.json")


def test_a_copy_reads_the_same_packed_weights(plain, tmp_path):
    convert(plain(), tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    copied = copy.deepcopy(model)
    first, second = (found.model.layers[0].mlp.up_proj for found in (model, copied))
    assert second is not first
    assert second.packed is first.packed
    expected = logits(model)
    assert torch.equal(logits(copied), expected)
    copied.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)


def test_saving_says_what_it_cannot_do(plain, tmp_path):
    convert(plain(), tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    (tmp_path / "file").write_text("mine")
    for arguments, words in (
        ({"variant": "fp16"}, "has no variants"),
        ({"push_to_hub": True}, "save to a folder first"),
    ):
        with pytest.raises(InvalidInput, match=words):
            model.save_pretrained(tmp_path / "out", **arguments)
    with pytest.raises(sparity.SparityError, match="cannot create the folder"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
@pytest.mark.parametrize(("dtype", "slow"), [("float32", True), ("bfloat16", False)])
def test_loading_says_what_will_be_slow(plain, tmp_path, caplog, dtype, slow):
    folder = plain(dtype=dtype, output={"format": "packed"})
    with caplog.at_level("WARNING", logger="sparity"):
        AutoModelForCausalLM.from_pretrained(folder)
    said = [record.getMessage() for record in caplog.records if "slow" in record.getMessage()]
    words = "21 packed matrices are unpacked for every product, which is slow: kernels take bfloat16, not float32"
    assert said == ([words] if slow else [])
