"""A packed checkpoint that is not whole never becomes a model: not by transformers, not by Sparity, not converted."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mutants
import sparity
from packed_folders import change, logits
from sparity.errors import CorruptFile, SparityError
from sparity.models import Decoder
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.verify import verify

REST, FIRST = "sparity-00001-of-00004.safetensors", "sparity-00002-of-00004.safetensors"
UP, QUERY = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
NORM = "model.layers.0.input_layernorm.weight"


def reindex(folder):
    homes = {}
    for path in sorted(folder.glob("*.safetensors")):
        homes |= dict.fromkeys(mutants.split(path.read_bytes())[1], path.name)
    (folder / "sparity.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))


def drop(*names):
    def edit(about, header, tensors):
        for name in names:
            header.pop(name)
            tensors.pop(name)

    return edit


def empty(about, header, tensors):
    """The matrices are no longer named; their tensors stay."""
    about["matrices"] = {}


def forget(*names):
    def edit(about, header, tensors):
        for name in names:
            about["matrices"].pop(name)

    return edit


def forget_all_of(name):
    def edit(about, header, tensors):
        about["matrices"].pop(name)
        for part in [part for part in tensors if part.startswith(f"{name}.")]:
            header.pop(part)
            tensors.pop(part)

    return edit


def retype(name, code):
    def edit(about, header, tensors):
        header[name]["dtype"] = code
        if code == "I64":
            tensors[name] = tensors[name] * 4
        if code == "F32":
            tensors[name] = bytes(len(tensors[name]) * 2)

    return edit


def add(name, shape=(4,)):
    def edit(about, header, tensors):
        header[name], tensors[name] = {"dtype": "BF16", "shape": list(shape)}, bytes(2 * shape[0])

    return edit


def turn(*names):
    return lambda about, header, tensors: header["__metadata__"].update(transposed=json.dumps(list(names)))


DAMAGES = {
    "no matrix is named": (FIRST, empty, "lacks"),
    "a matrix is not named": (FIRST, forget(UP), "lacks"),
    "two matrices are not named": (FIRST, forget(UP, QUERY), "lacks"),
    "a matrix is gone": (FIRST, forget_all_of(UP), "lacks"),
    "a norm is gone": (FIRST, drop(NORM), "lacks"),
    "the last norm is gone": (REST, drop("model.norm.weight"), "lacks"),
    "the embedding is gone": (REST, drop("model.embed_tokens.weight"), "lacks"),
    "the head is gone": (REST, drop("lm_head.weight"), "lacks"),
    "a norm in whole numbers": (FIRST, retype(NORM, "I16"), f"{NORM} is stored as int16"),
    "a norm in unsigned numbers": (FIRST, retype(NORM, "I64"), f"{NORM} is stored as int64"),
    "an embedding in whole numbers": (REST, retype("model.embed_tokens.weight", "I16"), "is stored as int16"),
    "a norm of another name": (FIRST, add("model.layers.0.other_norm.weight"), "does not have"),
    "a block more": (FIRST, add("model.layers.9.input_layernorm.weight"), "does not have"),
    "a bias": (FIRST, add(f"{UP}.bias"), "does not have"),
    "a part that looks like one of a matrix": (FIRST, add("model.layers.0.mlp.values"), "does not have"),
    "a square matrix that is turned": (FIRST, turn(QUERY), r"is packed as \[in, out\]|is a Linear in this model"),
}


def uses(folder):
    yield sparity.load
    yield AutoModelForCausalLM.from_pretrained
    yield lambda copy: AutoModelForCausalLM.from_pretrained(copy, ignore_mismatched_sizes=True)
    yield Decoder.open
    yield lambda copy: convert(copy, folder.with_name("out"))


@pytest.mark.parametrize("name", DAMAGES)
def test_it_is_refused_whoever_loads_it(copy, name):
    shard, edit, words = DAMAGES[name]
    change(copy / shard, edit)
    reindex(copy)
    for use in uses(copy):
        with pytest.raises(CorruptFile, match=words):
            use(copy)
    assert not list(copy.parent.glob("out*"))


def test_verify_refuses_a_matrix_that_is_turned_and_whole_numbers(plain, token_files, tmp_path):
    recipe = {
        "stages": [{"prune": {"score": "magnitude"}}],
        "measure": {"speed": None},
        "output": {"format": "packed"},
    }
    sparity.run(recipe, model=str(plain), output=tmp_path / "out", device="cpu")
    assert not verify(tmp_path / "out").problems
    whole = (tmp_path / "out" / FIRST).read_bytes()
    for edit, words in ((turn(QUERY), r"is packed as \[in, out\]"), (retype(NORM, "I16"), "is stored as int16")):
        (tmp_path / "out" / FIRST).write_bytes(whole)
        change(tmp_path / "out" / FIRST, edit)
        with pytest.raises(CorruptFile, match=words):
            verify(tmp_path / "out")


def test_a_sound_one_is_loaded(copy, plain):
    expected = logits(sparity.load(plain))
    for load in (sparity.load, AutoModelForCausalLM.from_pretrained):
        assert torch.allclose(logits(load(copy)), expected, rtol=0.05, atol=0.05)


def test_tensors_without_a_use_are_carried_and_named(plain, tmp_path):
    """Old checkpoints hold such tensors; packing loses nothing, and says which they are."""
    folder = shutil.copytree(plain, tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
    tensors["model.layers.7.eh_proj.weight"] = torch.ones(4, 4)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    convert(folder, tmp_path / "packed")
    sparity.load(tmp_path / "packed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "plain")
    found = {name: x for path in (tmp_path / "plain").glob("*.safetensors") for name, x in load_file(path).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("said", ["5", "{}", "[5]", "[", "[" * 9000])
def test_a_list_of_names_that_is_none_is_refused(copy, said):
    change(copy / FIRST, lambda about, header, tensors: header["__metadata__"].update(unused=said))
    for use in uses(copy):
        with pytest.raises(SparityError, match=r"makes no sense|no list of names"):
            use(copy)


@pytest.mark.parametrize("name", [NORM, "lm_head.weight", f"{UP}.weight"])
def test_a_plain_tensor_in_whole_numbers_is_refused(plain, tmp_path, name):
    folder = shutil.copytree(plain, tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(torch.int16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for use in (sparity.load, Decoder.open, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(CorruptFile, match=f"{name} is stored as int16, but the model has floating-point numbers"):
            use(folder)
    assert not list(tmp_path.glob("out*"))
