"""Folders of packed shards that lie, and damage in numbers: refused, or read as what they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import mutants
import sparity
from packed_folders import change
from sparity.errors import CorruptFile, InvalidInput, SparityError
from sparity.pipeline.run.packing import convert

WHOLE = "sparity-00002-of-00004.safetensors"  # the first block
UP = "model.layers.0.mlp.up_proj"
QUERY = "model.layers.0.self_attn.q_proj"  # [32, 32]


def refused(folder, words):
    """By Sparity's own loader, by transformers', and when it is converted; nothing is left."""
    with pytest.raises(SparityError, match=words):
        sparity.load(folder)
    with pytest.raises((SparityError, OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(SparityError, match=words):
        convert(folder, folder.with_name("out"))
    assert not folder.with_name("out").exists()


def rename(old, new):
    def edit(about, header, tensors):
        about["matrices"] = {new if name == old else name: entry for name, entry in about["matrices"].items()}
        for known in (header, tensors):
            for name in [name for name in known if name.startswith(f"{old}.")]:
                known[new + name.removeprefix(old)] = known.pop(name)

    return edit


def beside(name, shape):
    """An ordinary tensor of zeros more."""

    def edit(_, header, tensors):
        size = 2 * shape[0] * shape[1]
        header[name], tensors[name] = {"dtype": "BF16", "shape": list(shape)}, bytes(size)

    return edit


def reindex(folder):
    homes = {}
    for path in sorted(folder.glob("*.safetensors")):
        homes |= dict.fromkeys(mutants.split(path.read_bytes())[1], path.name)
    (folder / "sparity.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))


SHARDS = {
    "a tensor that is also packed": (beside(f"{UP}.weight", (64, 32)), "is there twice"),
    "a matrix for a norm": (rename(UP, "model.layers.0.input_layernorm"), "is there twice|lacks"),
    "a matrix for the embedding": (rename(UP, "model.embed_tokens"), "is there twice|lacks"),
    "a matrix for a block": (rename(UP, "model.layers.0"), "lacks|is a LlamaDecoderLayer"),
    "a matrix for nothing": (rename(UP, ""), "lacks|is a LlamaForCausalLM"),
    "a matrix of another block": (rename(UP, "model.layers.1.mlp.up_proj"), "is there twice"),
    "a transposed name that is unknown": (
        lambda _, header, __: header["__metadata__"].update(transposed='["model.norm"]'),
        "transposed that are not there",
    ),
    "transposed names that are an object": (
        lambda _, header, __: header["__metadata__"].update(transposed="{}"),
        "has no list of names under 'transposed'",
    ),
    "deep transposed names": (
        lambda _, header, __: header["__metadata__"].update(transposed="[" * 9000 + "]" * 9000),
        "makes no sense",
    ),
    "another shape": (lambda about, *_: about["matrices"][UP].update(shape=[63, 32]), "has shape|does not fit"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_that_lies_is_refused(copy, name):
    edit, words = SHARDS[name]
    change(copy / WHOLE, edit)
    reindex(copy)
    refused(copy, words)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0", "model.rotary_emb", ""])
def test_only_a_linear_layer_is_packed(copy, name):
    change(copy / WHOLE, rename(UP, name))
    (copy / "sparity-00001-of-00004.safetensors").write_bytes(
        (copy / "sparity-00001-of-00004.safetensors").read_bytes().replace(b"embed_tokens", b"embed_tokenz")
    )
    reindex(copy)
    with pytest.raises(CorruptFile, match=r"is packed as a linear layer|no module|stored row by row"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_square_matrix_cannot_be_turned(copy):
    edit = lambda _, header, __: header["__metadata__"].update(transposed=json.dumps([QUERY]))  # noqa: E731
    change(copy / WHOLE, edit)
    with pytest.raises(CorruptFile, match="is a Linear in this model"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("version", [True, 1.0, "1", 3, 0, None, [1], 10**400, "9" * 10_000])
def test_another_version_is_refused_everywhere(copy, version):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["version"] = version
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="a checkpoint of Sparity in version"):
        convert(copy, copy.with_name("out"))
    with pytest.raises(InvalidInput, match="a checkpoint of Sparity in version"):
        sparity.load(copy)
    with pytest.raises(InvalidInput, match="a checkpoint of Sparity in version"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_an_index_that_lies_is_refused(copy, sound):
    index = copy / "sparity.safetensors.index.json"
    content = json.loads(index.read_text())
    homes = content["weight_map"]
    outside = os.path.relpath(sound / WHOLE, copy)
    moved = {name: outside if shard == WHOLE else shard for name, shard in homes.items()}
    every = {name: str(sound / shard) for name, shard in homes.items()}
    for lie, words in (
        (moved, "is not a file of this folder"),
        (every, "is not a file of this folder"),
        ({**homes, "ghost": "/dev/zero"}, "is not a file of this folder"),
        ({**homes, "ghost": WHOLE}, "lists 1 tensors that no shard holds"),
        ({**homes, "ghost": "."}, "missing shards|not a file"),
        ({**homes, f"{UP}.values": "sparity-00003-of-00004.safetensors"}, "not where the index says"),
        ({name: shard for name, shard in homes.items() if shard != WHOLE}, "lacks"),
        ({}, "missing shards|lacks|no floating"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": lie}))
        with pytest.raises(SparityError, match=words):
            convert(copy, copy.with_name("out"))
        with pytest.raises(SparityError):
            sparity.load(copy)
        with pytest.raises((SparityError, OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(copy)
    index.write_text('{"weight_map": {"a": "x"}, "weight_map": {"a": "y"}}')
    with pytest.raises(CorruptFile, match="'weight_map' is there twice"):
        sparity.load(copy)


def test_a_shard_that_is_a_device_or_a_pipe_is_refused(copy):
    (copy / WHOLE).unlink()
    (copy / WHOLE).symlink_to("/dev/zero")
    with pytest.raises(CorruptFile, match="missing shards"):
        sparity.load(copy)
    (copy / WHOLE).unlink()
    os.mkfifo(copy / WHOLE)
    with pytest.raises(CorruptFile, match="missing shards"):
        sparity.load(copy)


# ---- damage in numbers


def fuzz(what, path, count):
    script = Path(mutants.__file__)
    command = [sys.executable, str(script), what, str(path), "0", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_damaged_files_are_refused_or_multiply_as_they_read(tmp_path):
    seen = fuzz("files", tmp_path, 1500)
    assert seen["blind refused"] > 600
    assert seen["knowing refused"] > 450
    assert seen["knowing read"] > 60  # damage that makes another valid matrix must reach the kernels


def test_damaged_folders_are_refused_or_run(sound):
    seen = fuzz("folder", sound, 24)
    assert seen["refused"] > 24
    assert seen["read"] > 0
