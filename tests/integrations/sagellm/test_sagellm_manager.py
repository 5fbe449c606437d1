"""The manager on a real model: what it makes is what Sparity's own recipes make."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparity
from sparity.errors import CorruptFile, InvalidInput, RunConflict
from sparity.integrations import sagellm
from sparity.integrations.sagellm import SparsityConfig, SparsityManager

MODEL = "Qwen/Qwen2.5-14B"
FEW = {"samples": 4}
QUICK = {"rounds": 1, "prompt": 8, "tokens": 2}


def shards(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def tensors(folder):
    return {name: tensor for shard in shards(folder) for name, tensor in load_file(shard).items()}


def test_a_configuration_gives_the_bits_of_its_recipe(here, tmp_path):
    config = SparsityConfig(
        "block", 0.25, pruning_method="wanda", calibration_dataset="c4", exclude_layers=["layers.1"],
        fuse_with_quant=True, quant_dtype="fp8",
    )  # fmt: skip
    made = SparsityManager(config, output=tmp_path / "made", calibration=FEW).prune(MODEL)
    dense = [f"model.layers.1.{name}" for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )]  # fmt: skip
    recipe = {
        "calibration": {"text": "c4", "documents": "joined", "batch": 8, **FEW},
        "stages": [
            {"prune": {"score": "wanda", "pattern": "block:32x32", "sparsity": 0.25, "dense": dense}},
            {"quantize": {"method": "gptq", "grid": "e4m3", "group": 64, "dense": dense}},
        ],
        "measure": {"speed": None},
    }
    expected = tensors(sparity.run(recipe, model=MODEL, output=tmp_path / "expected", device="cpu").path)
    found = tensors(made)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert found["model.layers.0.mlp.up_proj.weight"].eq(0).any()


def test_what_is_there_is_not_made_again(here, tmp_path):
    config = SparsityConfig()
    manager = SparsityManager(config, output=tmp_path)
    path = Path(manager.prune(MODEL))
    made = path.stat().st_mtime_ns
    assert manager.prune(MODEL, SparsityConfig()) == str(path)
    assert path.stat().st_mtime_ns == made
    assert manager.prune(MODEL, SparsityConfig(n=1)) != str(path)
    (path / "sparity.json").write_text((path / "sparity.json").read_text().replace('"dtype": "torch.bf', '"dtype": "'))
    with pytest.raises(RunConflict, match="exists already"):
        manager.prune(MODEL)


@pytest.mark.parametrize(
    ("options", "layouts"),
    [
        ({"pattern": "n:m"}, {"two_of_four": 14}),
        ({"pattern": "n:m", "n": 4, "m": 8}, {"bitmask": 14}),
        ({"pattern": "n:m", "format": "dense"}, {"dense": 14}),
        ({"pattern": "unstructured"}, {"csr": 14}),
        ({"pattern": "unstructured", "format": "coo"}, {"coo": 14}),
        ({"pattern": "block"}, {"block": 14}),
    ],
)
def test_weights_are_held_as_the_configuration_says(options, layouts, here):
    config = SparsityConfig(**options)
    manager = SparsityManager(config)
    path = manager.prune(MODEL)
    loaded = manager.load_sparse_model(path)
    assert loaded.layouts == layouts
    plain, ids = sparity.load(path), torch.arange(1, 25)[None]
    with torch.no_grad():
        wanted, found = plain(ids).logits.float(), loaded.model(ids).logits.float()
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))


def test_another_layout_stands_over_the_configurations(here):
    config = SparsityConfig("unstructured")
    path = SparsityManager(config).prune(MODEL)
    loaded = SparsityManager(config, layout="smallest").load_sparse_model(path)
    assert loaded.layouts == {"bitmask": 14}
    assert "compiled kernels" in loaded.runs or "no compiled kernels" in loaded.runs


def test_a_type_that_the_engine_does_not_take_is_named(here, tmp_path):
    manager = SparsityManager(SparsityConfig(), output=tmp_path, dtype="float32")
    loaded = manager.load_sparse_model(manager.prune(MODEL))
    assert loaded.layouts == {"dense": 14}
    assert loaded.runs == "the model's own products: the engine runs models in bfloat16 on the CPU, not float32 on cpu"


def test_tensorrt_says_what_is_exported_and_why_no_engine_is_built(here, tmp_path):
    config = SparsityConfig(backend="tensorrt")
    manager = SparsityManager(config, output=tmp_path)
    path = manager.prune(MODEL)
    (note,) = manager.notes
    for words in ("ordinary Hugging Face folder with its zeros", "convert_checkpoint.py", "no engine is built", path):
        assert words in note
    weight = tensors(path)["model.layers.0.mlp.up_proj.weight"]
    assert (weight.view(-1, 4) != 0).sum(1).max() == 2
    assert manager.report() == {"avg_sparsity": 0.5}
    for asked in (manager.select_kernel, lambda: manager.load_sparse_model(path)):
        with pytest.raises(InvalidInput, match="no engine is built"):
            asked()


def test_verifying_counts_zeros_by_layer_and_sees_what_was_altered(here, tmp_path):
    manager = SparsityManager(SparsityConfig(target_layers=["mlp.up_proj"]), output=tmp_path)
    path = manager.prune(MODEL)
    found = manager.verify_sparsity(path)
    assert {name: share for name, share in found.items() if share} == {f"layer.{i}.mlp.up_proj": 0.5 for i in (0, 1)}
    assert len(found) == 14
    assert set(manager.verify_sparsity(MODEL).values()) == {0.0}  # a model that Sparity did not write
    shard = shards(path)[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptFile, match="make it again"):
        manager.verify_sparsity(path)


def test_the_report_is_that_of_the_measurements(here):
    config = SparsityConfig(target_layers=["mlp"])
    manager = SparsityManager(config, speed=QUICK, windows=2)
    path = manager.prune(MODEL)
    report = manager.report()
    assert report["avg_sparsity"] == 0.5  # of the projections that have zeros, as in the specification's example
    sparse, dense = (sagellm.measure_performance(sagellm.load_model(name), windows=2) for name in (path, MODEL))
    assert report["perplexity"] == pytest.approx(sparse["ppl"], rel=0.05)  # here on the engine, there in transformers
    assert report["perplexity_delta"] == pytest.approx(report["perplexity"] / dense["ppl"] - 1)
    assert 0 < report["memory_saving"] < 0.4
    assert all(math.isfinite(value) for value in report.values())
    assert {"speedup", "speedup_prefill"} < report.keys()


def test_a_report_of_several_runs_is_against_the_first_model(here):
    """The quantised model was made of a pruned one; the dense one is what that was made of."""
    path = sagellm.joint_sparse_quant(MODEL)
    manager = SparsityManager(SparsityConfig())
    assert manager._dense_of(path) == MODEL
    assert manager._dense_of(MODEL) == MODEL


def test_nothing_to_report():
    with pytest.raises(InvalidInput, match="prune or load a model first"):
        SparsityManager(SparsityConfig()).report()


def test_pruning_by_a_dynamic_pattern_is_refused(here):
    with pytest.raises(InvalidInput, match="give the model to load_sparse_model"):
        SparsityManager(SparsityConfig("dynamic")).prune(MODEL)


def test_small_activations_are_skipped_while_the_model_runs(here, tmp_path):
    """Every input of a projection that does not pass the threshold is 0, from the second token on."""
    config = SparsityConfig("dynamic", enable_dynamic=True, dynamic_threshold=0.5, backend="triton")
    loaded = SparsityManager(config).load_sparse_model(MODEL)
    assert loaded.threshold == 0.5
    assert loaded.kernel == "triton_dynamic_sparse_kernel"
    plain, ids = sparity.load(MODEL), torch.arange(1, 13)[None]

    def hook(module, arguments):
        x = arguments[0].clone()
        x[:, 1:][x[:, 1:].abs().float() <= 0.5] = 0
        return (x, *arguments[1:])

    layers = [module for name, module in plain.named_modules() if name.endswith("_proj")]
    for layer in layers:
        layer.register_forward_pre_hook(hook)
    with torch.no_grad():
        wanted, found = plain(ids).logits.float(), loaded.model(ids).logits.float()
        untouched = sparity.load(MODEL)(ids).logits.float()
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
    assert not torch.allclose(untouched, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
    loaded.model.save_pretrained(tmp_path / "saved")  # and stays so
    with torch.no_grad():
        torch.testing.assert_close(sparity.load(tmp_path / "saved")(ids).logits.float(), found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_dtype": "int16"}, "int2 to int8"),
        ({"activation_dtype": "w8a8"}, "activations stay in 16 bits"),
    ],
)
def test_quantisation_that_is_not_done_is_refused(options, words):
    with pytest.raises(InvalidInput, match=words):
        sagellm.QuantConfig(**options)


def test_quantising_without_a_text(here, tmp_path):
    manager = sagellm.QuantizationManager(sagellm.QuantConfig(calibration="nearest"), output=tmp_path)
    weight = tensors(manager.calibrate(MODEL))["model.layers.0.mlp.up_proj.weight"].float()
    assert max(len(group.unique()) for group in weight.view(-1, 64)) <= 16
    with pytest.raises(InvalidInput, match="gptq reads a text"):
        manager.calibrate(MODEL, None, sagellm.QuantConfig(calibration="gptq"))
