"""Checkpoints with stages at run time: loaded by Sparity and by transformers, copied, saved, converted and verified."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

import sparity
from packed_folders import TOKENS, logits, same, tensors
from sparity.checkpoints.packed import runtime_of
from sparity.engine.modules.linear import PackedLinear
from sparity.engine.modules.skips import InputSkip
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.attached_runtime import runtime_attached
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.verify import verify
from sparity.quality.perplexity import perplexity

DATA = "sparity-dynamic/01-activations.safetensors"


@pytest.fixture(scope="module")
def folders(family_models, token_files, tmp_path_factory):
    """A function that gives a tiny model of a family, 2:4 and with thresholds, plain or packed; made once."""
    made = {}

    def folder(family="llama", layout="plain"):
        if (family, layout) not in made:
            recipe = {
                "dtype": "bfloat16",
                "calibration": {"tokens": token_files["calibration"], "batch": 4},
                "stages": [{"prune": {"pattern": "2:4"}}, {"activations": {"sparsity": 0.5}}],
                "measure": {"speed": None},
                "output": {"format": layout},
            }
            output = tmp_path_factory.mktemp("runtime") / layout
            made[family, layout] = sparity.run(recipe, model=family_models[family], output=output, device="cpu").path
        return made[family, layout]

    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def hooks(model):
    """Those that skip channels, and what each of the model and its base has beside them."""
    found = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return sum(isinstance(hook, InputSkip) for hook in found)


@pytest.mark.parametrize("layout", ["plain", "packed"])
@pytest.mark.parametrize(("family", "modules"), [("llama", 21), ("gpt2", 12), ("phi3", 12)])
def test_both_loaders_attach_what_was_saved(folders, family, modules, layout):
    folder = folders(family, layout)
    ours, theirs = sparity.load(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    dense = sparity.load(folder, runtime=False)
    assert hooks(ours) == hooks(theirs) == modules
    assert hooks(dense) == 0
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), logits(dense))
    assert any(isinstance(module, PackedLinear) for module in ours.modules()) == (layout == "packed")
    headless = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        inner = ours.base_model(TOKENS, use_cache=False).last_hidden_state
        assert torch.equal(headless(TOKENS, use_cache=False).last_hidden_state, inner)
    assert load_file(folder / DATA).keys() == runtime_attached(ours).data[0].keys()


def test_packed_and_plain_are_the_same_model(folders):
    plain, packed = sparity.load(folders()), sparity.load(folders(layout="packed"))
    assert folders().joinpath(DATA).read_bytes() == folders(layout="packed").joinpath(DATA).read_bytes()
    expected = logits(plain)
    assert float((logits(packed) - expected).abs().max()) <= 0.03 * float(expected.abs().max())


def test_a_plain_model_is_an_ordinary_one_but_for_its_hooks(folders):
    model = AutoModelForCausalLM.from_pretrained(folders())
    assert not hasattr(model.config, "quantization_config")
    assert getattr(model, "hf_quantizer", None) is None
    masked = logits(model.float())  # transformers refuses this of quantised models
    assert model.dtype == torch.float32
    assert not torch.equal(masked, logits(sparity.load(folders(), dtype="float32", runtime=False)))
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.any()


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_a_copy_behaves_alike_and_outlives_its_original(folders, layout):
    model = sparity.load(folders(layout=layout))
    expected, twin = logits(model), copy.deepcopy(model)
    del model
    assert torch.equal(logits(twin), expected)
    with pytest.raises(InvalidInput, match="cannot be pickled"):
        pickle.dumps(twin)


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_a_model_that_is_saved_again_keeps_its_stages(folders, tmp_path, layout):
    folder = folders(layout=layout)
    model = copy.deepcopy(sparity.load(folder))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / DATA).read_bytes() == (folder / DATA).read_bytes()
    assert config_of(tmp_path / "again")["quantization_config"] == config_of(folder)["quantization_config"]
    again = sparity.load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    (tmp_path / "again" / "sparity-dynamic" / "00-old.safetensors").write_bytes(b"left over")
    again.save_pretrained(tmp_path / "again")  # over itself
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()), logits(model))
    assert [path.name for path in (tmp_path / "again" / "sparity-dynamic").iterdir()] == ["01-activations.safetensors"]
    sparity.load(folder, runtime=False).save_pretrained(tmp_path / "without")
    assert runtime_of(tmp_path / "without") == ()
    assert not (tmp_path / "without" / "sparity-dynamic").exists()
    headless = AutoModel.from_pretrained(folder)
    headless.save_pretrained(tmp_path / "headless")
    assert hooks(AutoModel.from_pretrained(tmp_path / "headless")) == 21
    with pytest.raises(InvalidInput, match="save to a folder first"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)


def test_a_plain_model_saved_over_a_packed_one_is_read_as_plain(folders, tmp_path):
    sparity.load(folders(layout="packed")).save_pretrained(tmp_path / "model")
    plain = sparity.load(folders())
    plain.save_pretrained(tmp_path / "model")
    assert not Decoder.open(tmp_path / "model").source.packed
    again = sparity.load(tmp_path / "model")
    assert not any(isinstance(module, PackedLinear) for module in again.modules())
    assert torch.equal(logits(again), logits(plain))


def test_there_and_back_by_convert_with_the_data(folders, tmp_path):
    folder = folders()
    assert convert(folder, tmp_path / "packed") == "packed"
    assert convert(tmp_path / "packed", tmp_path / "back") == "plain"
    assert same(tensors(folder), tensors(tmp_path / "back"))
    for place in (tmp_path / "packed", tmp_path / "back"):
        assert (place / DATA).read_bytes() == (folder / DATA).read_bytes()
        assert verify(place).problems == ()
    assert config_of(tmp_path / "packed")["quantization_config"]["weights"] == "packed"
    assert config_of(tmp_path / "back")["quantization_config"] == config_of(folder)["quantization_config"]
    assert torch.equal(logits(sparity.load(tmp_path / "back")), logits(sparity.load(folder)))
    assert torch.equal(logits(sparity.load(tmp_path / "packed")), logits(sparity.load(folders(layout="packed"))))


def test_what_uses_a_model_uses_its_stages(folders, token_files):
    model, dense = sparity.load(folders()), sparity.load(folders(), runtime=False)
    ids = torch.arange(90) % 97
    assert perplexity(model, ids, window=30) != perplexity(dense, ids, window=30)
    answer = model.generate(TOKENS[:1], max_new_tokens=6, do_sample=False)
    cache, step, found = DynamicCache(), TOKENS[:1], TOKENS[:1]
    for _ in range(6):  # the prompt with a cache is dense, each token after it sparse
        with torch.no_grad():
            step = model(step, past_key_values=cache).logits[:, -1:].argmax(-1)
        found = torch.cat([found, step], 1)
    assert torch.equal(answer[:, : found.shape[1]], found[:, : answer.shape[1]])


def test_on_the_engine_it_stays_attached_and_is_saved(folders, tmp_path):
    model = sparity.load(folders())
    expected = logits(model)
    with sparity.attached(model):
        found = logits(model)
        assert float((found - expected).abs().max()) <= 0.03 * float(expected.abs().max())
        assert hooks(model) == 21
        model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(sparity.load(tmp_path / "packed")), found)
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(sparity.load(tmp_path / "plain")), expected)


def test_a_run_on_a_model_with_stages_is_refused(folders, tmp_path):
    stages = [{"prune": {"score": "magnitude"}}]
    for model in (folders(), sparity.load(folders()), folders(layout="packed")):
        with pytest.raises(InvalidInput, match=r"has run-time stages \(activations\).*one recipe.*runtime=False"):
            sparity.run({"stages": stages, "measure": {"speed": None}}, model=model, output=tmp_path / "out")
    without = sparity.load(folders(), runtime=False)
    out = sparity.run({"stages": stages, "measure": {"speed": None}}, model=without, output=tmp_path / "out").path
    assert runtime_of(out) == ()


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
torch.save(model(torch.arange(40).reshape(2, 20) % 97, use_cache=False).logits.float().detach(), sys.argv[2])
"""


def test_transformers_alone_warns_and_loads_the_model_without_its_stages(folders, tmp_path):
    command = [sys.executable, "-c", ALONE, str(folders()), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "Unknown quantization type, got sparity" in done.stderr
    found, dense = torch.load(tmp_path / "logits"), logits(sparity.load(folders(), runtime=False))
    assert torch.allclose(found, dense, rtol=0.03, atol=0.03 * float(dense.abs().max()))


def test_version_1_is_read_as_packed_weights_alone(folders, tmp_path):
    convert(folders(layout="packed"), tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "old")
    config = config_of(tmp_path / "old")
    config["quantization_config"] = {"quant_method": "sparity", "version": 1}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    expected = logits(sparity.load(folders(layout="packed"), runtime=False))
    for model in (sparity.load(tmp_path / "old"), AutoModelForCausalLM.from_pretrained(tmp_path / "old").eval()):
        assert hooks(model) == 0
        assert torch.equal(logits(model), expected)
