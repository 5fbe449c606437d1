"""Packed checkpoints: bit-exact there and back, the same model in transformers, and refused where Sparity is not."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparity
from families import tiny_configs
from interruptions import Killed, contents, dies_at
from packed_folders import alone, logits, same, tensors
from sparity.engine.modules.linear import PackedLinear
from sparity.errors import CorruptFile, InvalidInput, RunConflict
from sparity.formats import format_of
from sparity.models import Decoder
from sparity.pipeline.run.packing import convert

FAMILIES = tuple(tiny_configs())


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_bit_for_bit_and_the_same_model_in_between(plain, tmp_path, family):
    folder = plain(family)
    assert convert(folder, tmp_path / "packed") == "packed"
    assert convert(tmp_path / "packed", tmp_path / "back") == "plain"
    dense = tensors(folder)
    assert same(dense, tensors(tmp_path / "packed"))
    assert same(dense, tensors(tmp_path / "back"))
    loaded, expected = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "packed", folder))
    modules = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert modules
    assert loaded.dtype == torch.bfloat16
    for module in modules:
        assert module.packed.format == "bitmask"
        format_of(module.packed).check(module.packed)
    found, reference = logits(loaded), logits(expected)
    assert float((found - reference).abs().max()) <= 0.03 * float(reference.abs().max())
    assert sparity.load(tmp_path / "packed")


@pytest.mark.parametrize("prune", [{"solver": "sparsegpt"}, {"score": "wanda", "pattern": "2:4"}])
def test_what_it_takes_in_file_and_memory(plain, tmp_path, prune):
    folder = plain(prune=prune)
    convert(folder, tmp_path / "packed")
    names = [p.name for i in range(3) for site in Decoder.open(folder).sites(i) for p in site.projections]
    dense = {name: tensors(folder)[f"{name}.weight"] for name in names}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for name in names:
        module = model.get_submodule(name)
        rows, columns = dense[name].shape
        padded = -(-rows // 4) * 4 * (-(-columns // 64)) * 64  # tiny matrices are padded to whole tiles
        kept = int((dense[name] != 0).sum()) if "solver" in prune else padded // 2
        assert module.packed.nbytes <= padded / 8 + 2 * kept + 8 * (rows // 4 + 2)
        assert torch.equal(module.weight, dense[name])
        assert not list(module.parameters())


def test_int8_is_the_quantised_weight(plain, tmp_path):
    folder = plain()
    convert(folder, tmp_path / "packed", values="int8")
    before, after = tensors(folder), tensors(tmp_path / "packed")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    for name in changed:
        scale = before[name].float().abs().amax(1, keepdim=True) / 127
        error = (before[name].float() - after[name].float()).abs()
        assert bool((error <= scale * 0.5 + before[name].float().abs() * 2**-7).all())  # half a step, and bfloat16
        assert bool((after[name][before[name] == 0] == 0).all())  # zeros stay
    with pytest.raises(InvalidInput, match="convert it to plain first"):
        convert(tmp_path / "packed", tmp_path / "again", values="int8")


def test_without_sparity_loading_stops_and_with_it_in_either_order_it_works(plain, tmp_path):
    convert(plain(), tmp_path / "packed")
    said = alone(tmp_path / "packed")
    assert said.startswith("refused:")
    assert "model.safetensors" in said
    assert alone(tmp_path / "packed", "import sparity") == "loaded"
    assert alone(tmp_path / "packed", "import transformers.quantizers.auto", "import sparity") == "loaded"


def test_sparity_alone_imports_no_torch():
    script = "import sys, sparity; assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print('ok')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ok"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_is_saved_again_keeps_the_layout(plain, tmp_path, family):
    convert(plain(family), tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "model.safetensors").write_text("left by something else")
    model.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").glob("*.safetensors*")) == [
        "sparity-00001-of-00001.safetensors",
        "sparity.safetensors.index.json",
    ]
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    expected = {"quant_method": "sparity", "version": 2, "weights": "packed", "runtime": []}
    assert config["quantization_config"] == expected
    assert "transformers_weights" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert same(tensors(tmp_path / "again"), tensors(tmp_path / "packed"))
    assert alone(tmp_path / "again").startswith("refused:")


def test_a_run_writes_it_and_its_report_says_so(plain, tmp_path):
    folder = plain(output={"format": "packed"}, name="packed")
    expected = tensors(plain(name="plain"))
    assert same(tensors(folder), expected)
    assert not list(folder.glob("model*"))
    record = json.loads((folder / "sparity.json").read_text())
    assert record["layout"] == "packed"
    candidate = record["report"]["candidates"][0]
    assert candidate["name"].endswith(", packed")
    assert "21 matrices as bitmask" in candidate["notes"][0]
    assert "import sparity" in (folder / "README.md").read_text()
    from sparity.pipeline.run.verify import verify

    assert verify(folder).problems == ()
    convert(folder, tmp_path / "back")
    assert verify(tmp_path / "back").problems == ()
    again = sparity.run(
        {"stages": [{"prune": {"score": "magnitude", "sparsity": 0.75}}], "measure": {"speed": None}},
        model=str(folder),
        output=tmp_path / "pruned-again",
        device="cpu",
    )
    assert again.report.candidates[0].sparsity == pytest.approx(0.75, abs=0.02)


def test_a_run_that_is_killed_while_it_packs(tiny_llama_folder, token_files, tmp_path):
    recipe = {
        "model": str(tiny_llama_folder),
        "dtype": "bfloat16",
        "calibration": {"tokens": token_files["calibration"], "batch": 4},
        "stages": [{"prune": {"score": "wanda"}}],
        "measure": {"speed": None},
        "output": {"format": "packed"},
    }
    whole = contents(sparity.run(recipe, output=tmp_path / "whole").path)
    shards = {name: digest for name, digest in whole.items() if name.startswith("sparity-")}
    for count in range(8, 100):
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
            try:
                sparity.run(recipe, output=tmp_path / str(count))
                break
            except Killed:
                pass
        found = contents(sparity.run(recipe, output=tmp_path / str(count), resume=True).path)
        assert {name: found[name] for name in shards} == shards
        assert sorted(found) == sorted(whole)
    assert count > 8 + 4 + 1 + 2


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "index"])
def test_a_damaged_packed_checkpoint_is_refused(plain, tmp_path, damage):
    convert(plain(), tmp_path / "packed")
    path = tmp_path / "packed" / "sparity-00002-of-00004.safetensors"
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "index":
        path = tmp_path / "packed" / "sparity.safetensors.index.json"
        path.write_text("{")
    else:
        path.write_bytes(content[:-9] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFile):
        sparity.load(tmp_path / "packed")
    with pytest.raises((CorruptFile, OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(CorruptFile):
        convert(tmp_path / "packed", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_is_refused(plain, tmp_path):
    folder = plain()
    convert(folder, tmp_path / "packed")
    with pytest.raises(RunConflict, match="exists already"):
        convert(folder, tmp_path / "packed")
    with pytest.raises(InvalidInput, match="packed weights are multiplied on the CPU"):
        sparity.load(tmp_path / "packed", device="meta")
    config = json.loads((tmp_path / "packed/config.json").read_text())
    config["quantization_config"]["version"] = 3
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="version 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.raises(InvalidInput, match="`values: int8` needs `format: packed`"):
        sparity.Recipe.read({"stages": [{"prune": {}}], "output": {"values": "int8"}})


def test_a_dense_model_stays_dense(family_models, tmp_path):
    family_models["llama"].save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert not [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert torch.equal(logits(model), logits(family_models["llama"]))
