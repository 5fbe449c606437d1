"""Data of run-time stages that is missing, damaged, foreign or lies: the load stops, and never is the model dense."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparity
from sparity.errors import CorruptFile, InvalidInput, SparityError
from sparity.files import file_hash
from sparity.pipeline.run.verify import verify

FILE = "00-activations.safetensors"
FIRST = "model.layers.0.self_attn.q_proj.threshold"


@pytest.fixture(scope="module")
def sound(family_models, token_files, tmp_path_factory):
    """A function that gives a tiny Llama with thresholds, plain or packed, made once."""
    made = {}

    def folder(layout, family="llama"):
        if (layout, family) not in made:
            recipe = {
                "dtype": "bfloat16",
                "calibration": {"tokens": token_files["calibration"], "batch": 4},
                "stages": [{"activations": {"sparsity": 0.5}}],
                "measure": {"speed": None},
                "output": {"format": layout},
            }
            output = tmp_path_factory.mktemp("sound") / "model"
            made[layout, family] = sparity.run(recipe, model=family_models[family], output=output, device="cpu").path
        return made[layout, family]

    return folder


@pytest.fixture(params=["plain", "packed"])
def copied(request, sound, tmp_path):
    return shutil.copytree(sound(request.param), tmp_path / "model")


def refused(folder, words, error=SparityError):
    """By both loaders; without its stages the model can still be had."""
    for load in (sparity.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(error, match=words):
            load(folder)


def data(folder):
    return folder / "sparity-dynamic" / FILE


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder, edit):
    """The data after `edit(tensors)`, its hash made good."""
    tensors = load_file(data(folder))
    edit(tensors)
    save_file(tensors, data(folder), {"format": "pt"})
    edit_config(folder, lambda said: said["runtime"][0].update(sha256=file_hash(data(folder))))


def test_sound_files_are_loaded(copied):
    assert verify(copied).problems == ()
    assert sparity.load(copied)
    assert AutoModelForCausalLM.from_pretrained(copied)


def test_a_missing_file(copied):
    data(copied).unlink()
    refused(copied, rf"{FILE} is missing: the model was saved with activations.*runtime=False", CorruptFile)
    assert sparity.load(copied, runtime=False)
    assert verify(copied).problems == (f"sparity-dynamic/{FILE}: missing",)


def test_a_missing_folder(copied):
    shutil.rmtree(data(copied).parent)
    refused(copied, f"{FILE} is missing", CorruptFile)


def test_a_renamed_file(copied):
    data(copied).rename(data(copied).with_name("01-activations.safetensors"))
    refused(copied, f"{FILE} is missing", CorruptFile)
    assert verify(copied).problems == (
        f"sparity-dynamic/{FILE}: missing",
        "sparity-dynamic/01-activations.safetensors: weights that are not in the record",
    )


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_a_truncated_file(copied, left):
    data(copied).write_bytes(data(copied).read_bytes()[:left])
    refused(copied, "its hash differs", CorruptFile)
    assert verify(copied).problems == (f"sparity-dynamic/{FILE}: changed since it was written (hash differs)",)
    edit_config(copied, lambda said: said["runtime"][0].update(sha256=file_hash(data(copied))))
    refused(copied, "truncated or damaged", CorruptFile)  # also where the hash was made good


def test_an_altered_file(copied):
    content = bytearray(data(copied).read_bytes())
    content[-1] ^= 1
    data(copied).write_bytes(bytes(content))
    refused(copied, "its hash differs", CorruptFile)


def test_a_file_of_another_model(copied, sound):
    shutil.copy(data(sound("plain", "gpt2")), data(copied))
    refused(copied, "its hash differs", CorruptFile)
    edit_config(copied, lambda said: said["runtime"][0].update(sha256=file_hash(data(copied))))
    refused(copied, r"the file holds the unknown transformer\.h\.0.*belongs to another model", CorruptFile)


LIES = {
    "extra keys": (lambda tensors: tensors.update(more=torch.tensor(1.0)), "holds the unknown more"),
    "a block too many": (
        lambda tensors: tensors.update({FIRST.replace(".0.", ".7."): torch.tensor(1.0)}),
        "holds the unknown model.layers.7",
    ),
    "a key too few": (lambda tensors: tensors.pop(FIRST), "lacks model.layers.0.self_attn.q_proj"),
    "NaN": (lambda tensors: tensors.update({FIRST: torch.tensor(float("nan"))}), "holds nan, which is no threshold"),
    "negative": (lambda tensors: tensors.update({FIRST: torch.tensor(-1.0)}), "holds -1.0, which is no threshold"),
    "a vector": (lambda tensors: tensors.update({FIRST: torch.ones(31)}), r"is float32 \[31\], not float32 \[\] or"),
    "whole numbers": (lambda tensors: tensors.update({FIRST: torch.tensor(1)}), r"is int64 \[\], not float32"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_with_a_good_hash(copied, name):
    edit, words = LIES[name]
    rewrite(copied, edit)
    refused(copied, words, CorruptFile)


ENTRIES = {
    "an unknown stage": (lambda entry: entry.update(name="activation"), 'no stage "activation".*did you mean'),
    "a stage that edits weights": (lambda entry: entry.update(name="prune", options={}), "does nothing at run time"),
    "a stage that is a path": (lambda entry: entry.update(name="../os"), "no stage"),
    "an unknown option": (lambda entry: entry["options"].update(kept=0.5), "option kept: Extra inputs.*update sparity"),
    "an option of another type": (lambda entry: entry["options"].update(sparsity="most"), "option sparsity: "),
    "options that name other sites": (lambda entry: entry["options"].update(sites=["q"]), "holds the unknown"),
    "a file above": (lambda entry: entry.update(file="../model.safetensors"), "is not a file of sparity-dynamic"),
    "a file anywhere": (lambda entry: entry.update(file="/dev/zero"), "is not a file of sparity-dynamic"),
    "no file": (lambda entry: entry.update(file=""), "is not a file of sparity-dynamic"),
    "the folder": (lambda entry: entry.update(file="."), "is not a file of sparity-dynamic"),
    "the folder above": (lambda entry: entry.update(file=".."), "is not a file of sparity-dynamic"),
    "a number for a file": (lambda entry: entry.update(file=3), "makes no sense"),
    "no hash": (lambda entry: entry.pop("sha256"), "makes no sense"),
    "a key more": (lambda entry: entry.update(url="https://example.com"), "makes no sense"),
    "another hash": (lambda entry: entry.update(sha256="0" * 64), "its hash differs"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_lies(copied, name):
    edit, words = ENTRIES[name]
    edit_config(copied, lambda said: edit(said["runtime"][0]))
    refused(copied, words, (CorruptFile, InvalidInput))


@pytest.mark.parametrize("runtime", [{}, None, "", "activations", 3, [3], [[]], {"0": {}}])
def test_a_list_of_stages_that_makes_no_sense(copied, runtime):
    edit_config(copied, lambda said: said.update(runtime=runtime))
    refused(copied, "makes no sense", CorruptFile)


@pytest.mark.parametrize("weights", ["dense", None, 3, ["plain"]])
def test_weights_that_lie_in_an_unknown_way(copied, weights):
    edit_config(copied, lambda said: said.update(weights=weights))
    refused(copied, "weights: plain or packed; update sparity", InvalidInput)


def test_a_device_in_place_of_the_file(copied):
    data(copied).unlink()
    data(copied).symlink_to("/dev/zero")
    refused(copied, "is missing", CorruptFile)


def test_the_same_stage_twice_acts_twice_and_no_more(copied):
    edit_config(copied, lambda said: said.update(runtime=said["runtime"] * 2))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        twice = sparity.load(copied)(ids).logits
        edit_config(copied, lambda said: said.update(runtime=said["runtime"][:1]))
        assert torch.equal(twice, sparity.load(copied)(ids).logits)
