"""Packed files and folders from a stranger who knows the layout and computes every hash."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mutants
import sparity
from families import build, tiny_configs
from sparity.engine.formats import Packed, build_format, format_of
from sparity.engine.formats.storage import file
from sparity.engine.kernels import native
from sparity.engine.kernels.native_weight import NativeWeight, declines
from sparity.errors import CorruptFile, InvalidInput, SparityError
from sparity.models.source import CheckpointSource
from sparity.pipeline.packing import convert
from sparity.shards import check_header

WHOLE = "sparity-00002-of-00004.safetensors"  # the first block
UP = "model.layers.0.mlp.up_proj"
QUERY = "model.layers.0.self_attn.q_proj"  # [32, 32]


def raw(header, data=b"", length=None):
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWICE = b'{"x":%s,"x":%s}' % ((json.dumps(tensor()).encode(),) * 2)
HEADERS = {
    "a name twice": raw(TWICE, b"1234"),
    "data that two tensors share": raw({"x": tensor(), "y": tensor()}, b"1234"),
    "data that no tensor has": raw({"x": tensor(offsets=(4, 8))}, b"12345678"),
    "data left over": raw({"x": tensor()}, b"12345678"),
    "data that is not there": raw({"x": tensor(shape=(2,), offsets=(0, 8))}, b"1234"),
    "offsets the wrong way": raw({"x": tensor(offsets=(4, 0))}, b"1234"),
    "offsets far away": raw({"x": tensor(offsets=(2**63, 2**63 + 4))}, b"1234"),
    "negative offsets": raw({"x": tensor(offsets=(-4, 0))}, b"1234"),
    "a length beyond the file": raw({"x": tensor()}, b"1234", length=1000),
    "a length beyond all files": raw({"x": tensor()}, b"1234", length=2**63),
    "the largest length": raw({"x": tensor()}, b"1234", length=2**64 - 1),
    "a product beyond 64 bits": raw({"x": tensor(shape=(2**40, 2**40))}, b"1234"),
    "an enormous empty tensor": raw({"x": tensor(shape=(2**63, 0), offsets=(0, 0))}),
    "a negative side": raw({"x": tensor(shape=(-1,))}, b"1234"),
    "a broken side": raw({"x": tensor(shape=(1.0,))}, b"1234"),
    "a side that is true": raw({"x": tensor(shape=(True,))}, b"1234"),
    "another type of the same width": raw({"x": tensor("I64")}, b"1234"),
    "an unknown type": raw({"x": tensor("Q4")}, b"1234"),
    "no offsets": raw({"x": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "a number for a tensor": raw({"x": 5}, b"1234"),
    "metadata that are numbers": raw({"__metadata__": {"sparity": 5}, "x": tensor()}, b"1234"),
    "metadata that are a list": raw({"__metadata__": ["sparity"], "x": tensor()}, b"1234"),
    "a deep header": raw(b"[" * 100_000 + b"]" * 100_000),
    "deep metadata": raw(b'{"__metadata__":{"sparity":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"),
    "a list": raw([]),
    "no JSON": raw(b"{"),
    "not UTF-8": raw(b'{"\xff":1}'),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[name])
    with pytest.raises(CorruptFile):
        file.read(path)
    with pytest.raises(CorruptFile):
        CheckpointSource(tmp_path)


def test_a_pipe_and_a_device_are_refused_before_they_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(CorruptFile, match="no ordinary file"):
            check_header(path)
    (tmp_path / "linked").symlink_to("/dev/zero")
    with pytest.raises(CorruptFile, match="no ordinary file"):
        file.read(tmp_path / "linked")


# ---- one file, every hash right


@pytest.fixture
def path(tmp_path):
    matrices = {"a": build_format("bitmask").pack(mutants.weight()), "b": build_format("csr").pack(mutants.weight())}
    file.write(tmp_path / "packed.safetensors", matrices)
    return tmp_path / "packed.safetensors"


def change(path, edit):
    """The file after `edit(about, header, tensors)`, its hashes made good."""
    header, tensors = mutants.split(path.read_bytes())
    about = json.loads(header["__metadata__"]["sparity"])
    edit(about, header, tensors)
    header["__metadata__"]["sparity"] = json.dumps(about)
    path.write_bytes(mutants.joined(header, tensors, mutants.random.Random(0)))


def share(about, header, tensors):
    """Matrix `a.b` and matrix `a` with a part `b.values` would read one tensor."""
    about["matrices"]["a"]["hashes"]["b.values"] = ""


ENTRIES = {
    "a shape of texts": (lambda about, *_: about["matrices"]["a"].update(shape=["10", "70"]), "whole numbers"),
    "a shape that is a text": (lambda about, *_: about["matrices"]["a"].update(shape="ab"), "whole numbers"),
    "a shape of three": (lambda about, *_: about["matrices"]["a"].update(shape=[10, 70, 1]), "makes no sense"),
    "a negative shape": (lambda about, *_: about["matrices"]["a"].update(shape=[-10, -70]), "cannot be"),
    "no columns": (lambda about, *_: about["matrices"]["a"].update(shape=[10, 0]), "cannot be"),
    "a product beyond 64 bits": (lambda about, *_: about["matrices"]["a"].update(shape=[2**62, 2**62]), "cannot be"),
    "a product beyond memory": (lambda about, *_: about["matrices"]["a"].update(shape=[2**30, 2**30]), "more than"),
    "a number of many digits": (lambda about, *_: about["matrices"]["a"].update(shape=[10, 10**4000]), "cannot be"),
    "a type that is a list": (lambda about, *_: about["matrices"]["a"].update(dtype=["bfloat16"]), "makes no sense"),
    "a format that is a list": (lambda about, *_: about["matrices"]["a"].update(format=["bitmask"]), "must be texts"),
    "a format with a path": (lambda about, *_: about["matrices"]["a"].update(format="../csr"), "no format"),
    "a format that is a module": (lambda about, *_: about["matrices"]["a"].update(format="storage.file"), "no format"),
    "options that are a list": (lambda about, *_: about["matrices"]["a"].update(options=[1]), "makes no sense"),
    "options that are texts": (lambda about, *_: about["matrices"]["a"].update(options={"x": "1"}), "whole numbers"),
    "no hash of its own": (lambda about, *_: about["matrices"]["a"].update(hashes={}), "tensors and header differ"),
    "a shared tensor": (share, "names no tensors"),
    "a part with a strange name": (
        lambda about, *_: about["matrices"]["a"]["hashes"].update({"(((": ""}),
        "names no tensors",
    ),
    "a version that is true": (lambda about, *_: about.update(version=True), "version True; this Sparity reads 1"),
    "a version that is a float": (lambda about, *_: about.update(version=1.0), "version 1.0; this Sparity reads 1"),
    "a version that is long": (lambda about, *_: about.update(version="9" * 5000), "version '9+; this Sparity"),
    "another matrix's values": (
        lambda _, header, tensors: (
            tensors.update({"a.values": tensors["b.values"][:-2]}),
            header["a.values"].update(shape=[len(tensors["a.values"]) // 2]),
        ),
        "values are stored",
    ),
    "swapped types": (lambda _, header, __: header["a.values"].update(dtype="F16"), "expected bfloat16"),
    "signed masks": (lambda _, header, __: header["a.masks"].update(dtype="I8"), "expected uint8"),
    "unsigned columns": (lambda _, header, __: header["b.columns"].update(dtype="F32"), "expected int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_lies_is_refused(path, name):
    edit, words = ENTRIES[name]
    change(path, edit)
    with pytest.raises(CorruptFile, match=words):
        file.read(path)


def test_a_matrix_that_is_there_twice_is_refused(path):
    header, tensors = mutants.split(path.read_bytes())
    said = header["__metadata__"]["sparity"]
    first = json.dumps(json.loads(said)["matrices"]["a"])
    header["__metadata__"]["sparity"] = said.replace('"b": {', f'"a": {first}, "b": {{', 1)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))
    with pytest.raises(CorruptFile, match="'a' is there twice"):
        file.read(path)


@pytest.mark.parametrize("said", ["[" * 100_000, "{", "5", '{"version": 1}', '{"version": 1, "matrices": 5}'])
def test_metadata_that_say_nothing_are_refused(path, said):
    header, tensors = mutants.split(path.read_bytes())
    header["__metadata__"]["sparity"] = said
    path.write_bytes(raw(header, b"".join(tensors.values())))
    with pytest.raises(CorruptFile, match=r"cannot be read|version"):
        file.read(path)


@pytest.mark.parametrize("spaces", range(8))
def test_numbers_at_odd_addresses_are_read(tmp_path, spaces):
    """A header of any length is allowed, and then what follows is not aligned."""
    matrix = build_format("bitmask").pack(mutants.weight(), "int8")
    file.write(tmp_path / "sound", {"a": matrix})
    header, tensors = mutants.split((tmp_path / "sound").read_bytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + spaces)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))
    found = file.read(path)["a"]
    assert all(part.data_ptr() % part.element_size() == 0 for part in found.tensors.values())
    assert torch.equal(format_of(found).unpack(found), format_of(matrix).unpack(matrix))
    mutants.use(path)


@pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
def test_the_kernels_are_given_aligned_numbers_and_sums_that_fit():
    matrix = build_format("bitmask").pack(mutants.weight())
    odd = torch.zeros(len(matrix.tensors["values"]) * 2 + 1, dtype=torch.uint8).numpy()[1:]
    odd[:] = matrix.tensors["values"].view(torch.uint8).numpy()
    values = torch.frombuffer(odd.data, dtype=torch.bfloat16)
    assert values.data_ptr() % 2
    moved = NativeWeight(Packed("bitmask", (10, 70), torch.bfloat16, {**matrix.tensors, "values": values}))
    assert moved.packed.tensors["values"].data_ptr() % 2 == 0
    wide = build_format("csr").pack(torch.ones(1, 2**17).bfloat16(), "int8")
    assert "131072 columns" in declines(
        Packed("bitmask", (1, 2**17), torch.bfloat16, {"scales": wide.tensors["scales"]})
    )


# ---- a folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A tiny packed Llama."""
    model = build(tiny_configs()["llama"]).bfloat16()
    model.config.dtype = torch.bfloat16
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "proj" in name:
                values[torch.rand(values.shape) < 0.7] = 0
    folder = tmp_path_factory.mktemp("sound")
    model.save_pretrained(folder / "plain")
    convert(folder / "plain", folder / "packed")
    return folder / "packed"


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "packed")


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
        "transposed that are not there",
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
    with pytest.raises(CorruptFile, match=r"is packed as a linear layer|no module"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_square_matrix_cannot_be_turned(copy):
    edit = lambda _, header, __: header["__metadata__"].update(transposed=json.dumps([QUERY]))  # noqa: E731
    change(copy / WHOLE, edit)
    with pytest.raises(CorruptFile, match="is a Linear in this model"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("version", [True, 1.0, "1", 2, 0, None, [1], 10**400, "9" * 10_000])
def test_another_version_is_refused_everywhere(copy, version):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["version"] = version
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="a packed checkpoint of version"):
        convert(copy, copy.with_name("out"))
    with pytest.raises(InvalidInput, match="a packed checkpoint of version"):
        sparity.load(copy)
    with pytest.raises(InvalidInput, match="a packed checkpoint of version"):
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
