"""A packed matrix from a stranger: every contradiction is refused before anything reads by it."""

import dataclasses
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparity.checkpoints import packed_file
from sparity.errors import CorruptFile, InvalidInput, SparityError
from sparity.formats import Packed, build_format, format_of


def weight(rows=10, columns=70):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, columns, generator=generator).bfloat16()
    order = torch.rand(rows, -(-columns // 4), 4, generator=generator).argsort(-1)
    dense[(order >= 2).flatten(1)[:, :columns]] = 0
    return dense


def packed(name, values="same", **options):
    return build_format({name: options}).pack(weight(), values)


def changed(source, **tensors):
    return dataclasses.replace(source, tensors={**source.tensors, **tensors})


def edited(tensor, place, value):
    copy = tensor.clone()
    copy.view(-1)[place] = value
    return copy


def attack(name, part, edit, values="same", **options):
    source = packed(name, values, **options)
    return changed(source, **{part: edit(source.tensors[part])})


def beyond(name, row, byte):
    """A bit outside the shape, with value and offsets that go with it."""
    source = packed(name)
    masks = source.tensors["masks"].clone()
    masks[row // 4, byte // 8, row % 4, byte % 8] |= 128
    offsets = source.tensors["offsets"].clone()
    offsets[row // 4 + 1 :] += 1
    values = torch.cat((source.tensors["values"], torch.ones(1, dtype=torch.bfloat16)))
    return changed(source, masks=masks, offsets=offsets, values=values)


def beside_two_of_four():
    source = packed("two_of_four")
    values = source.tensors["values"].clone()
    values[0, 1, 0, 31] = float("nan")
    return changed(source, values=values)


def nothing(*indices, **more):
    """The tensors of a sparse matrix that keeps no weight."""
    empty = {name: torch.zeros(0, dtype=torch.int32) for name in indices}
    return {**empty, "values": torch.zeros(0, dtype=torch.bfloat16), **more}


ATTACKS = {
    "bitmask, a bit too many": (lambda: attack("bitmask", "masks", lambda t: edited(t, 0, 255)), "offsets disagree"),
    "bitmask, a bit too few": (lambda: attack("bitmask", "masks", lambda t: edited(t, 0, 0)), "offsets disagree"),
    "bitmask, values missing": (lambda: attack("bitmask", "values", lambda t: t[:-1].clone()), "but 3.. values"),
    "bitmask, values left over": (lambda: attack("bitmask", "values", lambda t: torch.cat((t, t))), "but 6.. values"),
    "bitmask, an offset moved": (lambda: attack("bitmask", "offsets", lambda t: edited(t, 1, 2**62)), "disagree"),
    "bitmask, a negative offset": (lambda: attack("bitmask", "offsets", lambda t: edited(t, 0, -8)), "disagree"),
    "bitmask, offsets missing": (lambda: attack("bitmask", "offsets", lambda t: t[:-1].clone()), r"int64 \[4\]"),
    "bitmask, a weight beside": (lambda: beyond("bitmask", row=0, byte=15), "outside 10 x 70"),
    "bitmask, a weight below": (lambda: beyond("bitmask", row=11, byte=0), "outside 10 x 70"),
    "bitmask, other values": (lambda: attack("bitmask", "values", lambda t: t.half()), "expected bfloat16"),
    "bitmask, other masks": (lambda: attack("bitmask", "masks", lambda t: t.to(torch.int32)), "expected uint8"),
    "bitmask, flat masks": (lambda: attack("bitmask", "masks", lambda t: t.flatten()), "expected uint8"),
    "bitmask, strided values": (lambda: attack("bitmask", "values", lambda t: t.repeat(2)[::2]), "contiguous"),
    "two_of_four, three of four": (lambda: attack("two_of_four", "masks", lambda t: edited(t, 0, 0x37)), "two of four"),
    "two_of_four, one of four": (lambda: attack("two_of_four", "masks", lambda t: edited(t, 3, 0x13)), "two of four"),
    "two_of_four, a value below": (lambda: attack("two_of_four", "values", lambda t: edited(t, -1, 1.0)), "outside"),
    "two_of_four, a NaN beside": (beside_two_of_four, "outside 10 x 70"),
    "two_of_four, values missing": (lambda: attack("two_of_four", "values", lambda t: t[:-1].clone()), "expected"),
    "csr, a column too far": (lambda: attack("csr", "columns", lambda t: edited(t, 5, 70)), r"outside 0\.\.69"),
    "csr, a negative column": (lambda: attack("csr", "columns", lambda t: edited(t, 0, -1)), r"outside 0\.\.69"),
    "csr, a column twice": (lambda: attack("csr", "columns", lambda t: edited(t, 1, int(t[0]))), "none twice"),
    "csr, falling offsets": (lambda: attack("csr", "offsets", lambda t: edited(t, 1, int(t[2]) + 1)), "must rise"),
    "csr, offsets too far": (lambda: attack("csr", "offsets", lambda t: edited(t, -1, 2**62)), "must rise"),
    "csr, a late start": (lambda: attack("csr", "offsets", lambda t: edited(t, 0, 1)), "must rise"),
    "csr, columns missing": (lambda: attack("csr", "columns", lambda t: t[:-1].clone()), "columns for"),
    "csr, long columns": (lambda: attack("csr", "columns", lambda t: t.long()), "expected int32"),
    "coo, a row too far": (lambda: attack("coo", "rows", lambda t: edited(t, -1, 10)), r"outside 0\.\.9"),
    "coo, a negative row": (lambda: attack("coo", "rows", lambda t: edited(t, 0, -1)), r"outside 0\.\.9"),
    "coo, rows out of order": (lambda: attack("coo", "rows", lambda t: edited(t, 0, 9)), "must not fall"),
    "coo, a place twice": (lambda: attack("coo", "columns", lambda t: edited(t, 1, int(t[0]))), "none twice"),
    "coo, rows missing": (lambda: attack("coo", "rows", lambda t: t[:-1].clone()), "rows and"),
    "block, a column too far": (lambda: attack("block", "columns", lambda t: edited(t, 1, 5)), r"outside 0\.\.4"),
    "block, columns in disorder": (lambda: attack("block", "columns", lambda t: edited(t, 0, 3)), "none twice"),
    "block, offsets too far": (lambda: attack("block", "offsets", lambda t: edited(t, 1, 6)), "must rise"),
    "block, columns missing": (lambda: attack("block", "columns", lambda t: t[:-1].clone()), "columns for"),
    "block, a value beside": (lambda: attack("block", "values", lambda t: edited(t, 4 * 256 + 15, 1.0)), "outside"),
    "block, a value below": (lambda: attack("block", "values", lambda t: edited(t, 255, 1.0)), "outside"),
    "block, other blocks": (lambda: attack("block", "values", lambda t: t.view(-1, 8, 32)), "expected bfloat16"),
    "dense, a row missing": (lambda: attack("dense", "values", lambda t: t[:-1].clone()), "expected bfloat16"),
    "columns, a channel missing": (
        lambda: attack("columns", "values", lambda t: t[:-1].clone()),
        r"bfloat16 \[70, 10\]",
    ),
    "columns, rows for channels": (
        lambda: attack("columns", "values", lambda t: t.T.clone().view(10, 70)),
        r"\[70, 10\]",
    ),
    "columns, another shape": (lambda: dataclasses.replace(packed("columns"), shape=(7, 100)), r"\[100, 7\]"),
    "columns, the int8 value that is none": (
        lambda: attack("columns", "values", lambda t: edited(t, 0, -128), "int8"),
        "-128",
    ),
    "int8, a NaN scale": (lambda: attack("csr", "scales", lambda t: edited(t, 0, float("nan")), "int8"), "finite"),
    "int8, a scale of zero": (lambda: attack("csr", "scales", lambda t: edited(t, 0, 0.0), "int8"), "above zero"),
    "int8, an infinite scale": (
        lambda: attack("csr", "scales", lambda t: edited(t, 0, float("inf")), "int8"),
        "finite",
    ),
    "int8, a scale missing": (lambda: attack("csr", "scales", lambda t: t[:-1].clone(), "int8"), r"float32 \[10\]"),
    "int8, floating values": (lambda: attack("csr", "values", lambda t: t.bfloat16(), "int8"), "expected int8"),
    "a tensor too many": (lambda: changed(packed("csr"), rows=torch.zeros(1)), "expected the tensors"),
    "a tensor too few": (lambda: Packed("csr", (10, 70), torch.float32, {}), "expected the tensors"),
    "another shape": (lambda: dataclasses.replace(packed("bitmask"), shape=(9, 70)), "outside|expected"),
    "a huge shape": (lambda: dataclasses.replace(packed("bitmask"), shape=(2**62, 2**62)), "cannot be"),
    "a negative shape": (lambda: dataclasses.replace(packed("csr"), shape=(-10, 70)), "cannot be"),
    "more weights than a matrix has": (
        lambda: Packed("coo", (2**31 - 1, 2**31 - 1), torch.bfloat16, nothing("rows", "columns")),
        "more than the 4294967296 weights",
    ),
    "blocks far larger than the matrix": (
        lambda: Packed("block", (1, 2**31), torch.bfloat16, {}, {"rows": 4096, "columns": 4096}),
        "cannot be",
    ),
    "blocks that fill up to more": (
        lambda: Packed(
            "block",
            (1, 2**31 - 1),
            torch.bfloat16,
            nothing("columns", offsets=torch.zeros(2, dtype=torch.int64), values=torch.ones(0, 4096, 16).bfloat16()),
            {"rows": 4096, "columns": 16},
        ),
        "filled up: 4096 x 2147483648 is more than",
    ),
    "int8, the value that is none": (lambda: attack("bitmask", "values", lambda t: edited(t, 0, -128), "int8"), "-128"),
    "an integer weight": (lambda: dataclasses.replace(packed("csr"), dtype=torch.int64), "cannot be"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_contradiction_is_refused(name):
    make, words = ATTACKS[name]
    found = make()
    with pytest.raises(CorruptFile, match=words):
        format_of(found).unpack(found)


@pytest.mark.parametrize("name", [name for name in ATTACKS if "strided" not in name and "shape" not in name])
def test_a_contradiction_whose_every_hash_is_right_is_refused(tmp_path, name):
    """An attacker computes hashes too."""
    make, words = ATTACKS[name]
    path = tmp_path / "packed.safetensors"
    try:
        packed_file.write(path, {"a": make()})
    except KeyError:
        pytest.skip("a type that a file does not have")
    with pytest.raises(CorruptFile, match=f"{words}|makes no sense|cannot be"):
        packed_file.read(path)


def test_options_from_a_stranger_are_checked():
    for options in ({"rows": 0}, {"rows": 2**40}, {"depth": 3}, {"rows": "16"}):
        with pytest.raises(InvalidInput):
            format_of(Packed("block", (4, 4), torch.float32, {}, options))
    with pytest.raises(InvalidInput, match="no format"):
        format_of(Packed("base", (4, 4), torch.float32, {}))
    with pytest.raises(InvalidInput, match="no format"):
        format_of(Packed("storage", (4, 4), torch.float32, {}))


# ---- the file


@pytest.fixture
def path(tmp_path):
    packed_file.write(tmp_path / "packed.safetensors", {"a": packed("bitmask"), "b.c": packed("csr", "int8")})
    return tmp_path / "packed.safetensors"


def rewritten(path, change):
    """The file again, after `change(header, tensors)`, the entries' own hashes made good."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["sparity"])
    change(header, tensors)
    for entry in header["matrices"].values() if isinstance(header["matrices"], dict) else ():
        if isinstance(entry, dict):
            entry.pop("hash", None)
            entry["hash"] = packed_file.entry_hash(entry)
    save_file(tensors, path, metadata={"sparity": json.dumps(header)})


def test_a_file_comes_back(path):
    found = packed_file.read(path)
    assert list(found) == ["a", "b.c"]
    assert torch.equal(format_of(found["a"]).unpack(found["a"]), weight())
    assert found["b.c"].quantized


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header, _: header.update(version=2), "version 2; this Sparity reads 1"),
        (lambda header, _: header.update(matrices=[]), "packed matrices of version"),
        (lambda header, _: header["matrices"].pop("a"), "tensors and header differ"),
        (lambda _, tensors: tensors.pop("a.masks"), "tensors and header differ"),
        (lambda _, tensors: tensors.update(more=torch.zeros(1)), "tensors and header differ"),
        (lambda _, tensors: tensors["a.values"].neg_(), 'tensor "values" was altered'),
        (lambda header, _: header["matrices"]["a"].update(format="zip"), 'no format "zip"'),
        (lambda header, _: header["matrices"]["a"].update(dtype="int64"), "makes no sense"),
        (lambda header, _: header["matrices"]["a"].update(shape=[10]), "makes no sense"),
        (lambda header, _: header["matrices"]["a"].update(shape=[10, 70.0]), "whole numbers"),
        (lambda header, _: header["matrices"]["a"].update(shape=[True, 70]), "whole numbers"),
        (lambda header, _: header["matrices"]["a"].update(shape=[9, 70]), "outside 9 x 70"),
        (lambda header, _: header["matrices"]["a"].update(options={"rows": 4}), 'no option "rows"'),
        (lambda header, _: header["matrices"]["a"].update(options=None), "makes no sense"),
        (lambda header, _: header["matrices"]["a"].update(hashes=None), "names no tensors"),
        (lambda header, _: header["matrices"].update(a=5), "names no tensors"),
        (lambda header, _: header["matrices"]["a"]["hashes"].update(values=5), "must be texts"),
    ],
)
def test_an_altered_file_is_refused(path, change, words):
    rewritten(path, change)
    with pytest.raises(CorruptFile, match=words):
        packed_file.read(path)


def test_an_altered_header_is_refused(path):
    """11 rows would fill the same tiles as 10: only the entry's hash tells."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b'\\"shape\\": [10, 70]', b'\\"shape\\": [11, 70]'))
    assert path.read_bytes() != content
    with pytest.raises(CorruptFile, match="header entry was altered"):
        packed_file.read(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFile):
        packed_file.read(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(CorruptFile, match="holds no packed matrices"):
        packed_file.read(tmp_path / "plain.safetensors")
    with pytest.raises(CorruptFile, match="is missing"):
        packed_file.read(tmp_path / "absent.safetensors")


def test_names_that_collide_are_refused(tmp_path):
    named = Packed("dense", (1, 1), torch.float32, {"b.values": torch.ones(1, 1)})
    with pytest.raises(InvalidInput, match=r"a\.b\.values"):
        packed_file.write(tmp_path / "packed.safetensors", {"a.b": packed("dense"), "a": named})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bytes_are_refused_or_harmless(path, data):
    """Damage anywhere ends in an error of ours, or, in the padding of the header, changes nothing."""
    original = path.read_bytes()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    try:
        found = packed_file.read(damaged)
    except SparityError:
        return
    sound = packed_file.read(path)
    for name, matrix in found.items():
        twin = next(iter(sound.values())) if name not in sound else sound[name]
        assert matrix.shape == twin.shape
        assert all(torch.equal(matrix.tensors[part], twin.tensors[part]) for part in twin.tensors)
