"""Packed files and folders from a stranger who knows the layout and computes every hash."""

import json
import os
from pathlib import Path

import pytest
import torch

import mutants
from packed_folders import change
from sparity.checkpoints import packed_file
from sparity.checkpoints.shards import check_header
from sparity.checkpoints.source import CheckpointSource
from sparity.engine.kernels import native
from sparity.engine.kernels.native_weight import NativeWeight, declines
from sparity.errors import CorruptFile
from sparity.formats import Packed, build_format, format_of

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
        packed_file.read(path)
    with pytest.raises(CorruptFile):
        CheckpointSource(tmp_path)


def test_a_pipe_and_a_device_are_refused_before_they_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(CorruptFile, match="no ordinary file"):
            check_header(path)
    (tmp_path / "linked").symlink_to("/dev/zero")
    with pytest.raises(CorruptFile, match="no ordinary file"):
        packed_file.read(tmp_path / "linked")


# ---- one file, every hash right


@pytest.fixture
def path(tmp_path):
    matrices = {"a": build_format("bitmask").pack(mutants.weight()), "b": build_format("csr").pack(mutants.weight())}
    packed_file.write(tmp_path / "packed.safetensors", matrices)
    return tmp_path / "packed.safetensors"


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
    "a format that is a module": (lambda about, *_: about["matrices"]["a"].update(format="storage.tiles"), "no format"),
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
        packed_file.read(path)


def test_a_matrix_that_is_there_twice_is_refused(path):
    header, tensors = mutants.split(path.read_bytes())
    said = header["__metadata__"]["sparity"]
    first = json.dumps(json.loads(said)["matrices"]["a"])
    header["__metadata__"]["sparity"] = said.replace('"b": {', f'"a": {first}, "b": {{', 1)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))
    with pytest.raises(CorruptFile, match="'a' is there twice"):
        packed_file.read(path)


@pytest.mark.parametrize("said", ["[" * 100_000, "{", "5", '{"version": 1}', '{"version": 1, "matrices": 5}'])
def test_metadata_that_say_nothing_are_refused(path, said):
    header, tensors = mutants.split(path.read_bytes())
    header["__metadata__"]["sparity"] = said
    path.write_bytes(raw(header, b"".join(tensors.values())))
    with pytest.raises(CorruptFile, match=r"cannot be read|version"):
        packed_file.read(path)


@pytest.mark.parametrize("spaces", range(8))
def test_numbers_at_odd_addresses_are_read(tmp_path, spaces):
    """A header of any length is allowed, and then what follows is not aligned."""
    matrix = build_format("bitmask").pack(mutants.weight(), "int8")
    packed_file.write(tmp_path / "sound", {"a": matrix})
    header, tensors = mutants.split((tmp_path / "sound").read_bytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + spaces)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))
    found = packed_file.read(path)["a"]
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
        Packed("bitmask", (1, 2**17), torch.bfloat16, wide.tensors, encoding=wide.encoding)
    )
