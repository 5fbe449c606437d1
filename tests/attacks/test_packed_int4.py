"""int4 matrices from a stranger: half bytes, groups, scales and zero points that contradict each other are refused."""

import dataclasses

import pytest
import torch

from sparity.checkpoints import packed_file
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats import build_format, format_of
from sparity.formats.encodings.int4 import Int4


def packed(name, rows=9, columns=64, **options):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, columns, generator=generator).bfloat16()
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    dense[(order >= 2).flatten(1)] = 0
    dense[0, 0], dense[0, 1] = 1, 0
    dense[-1] = 0
    dense[-1, 3] = 2
    if name in ("bitmask", "csr", "coo"):  # an odd number of values
        kept = int((Int4(**options).encode(dense)[0] != 0).sum())
        dense[-1, 0] = 0 if kept % 2 else 2
    return build_format(name).pack(dense, {"int4": options})


def attack(name, part, edit, **options):
    source = packed(name, **options)
    return dataclasses.replace(source, tensors={**source.tensors, part: edit(source.tensors[part])})


def edited(tensor, place, value):
    copy = tensor.clone()
    copy.view(-1)[place] = value
    return copy


def full(tensor):
    return edited(tensor, -1, int(tensor.view(-1)[-1]) | 0xF0)


ATTACKS = {
    "a scale of zero": (lambda: attack("dense", "scales", lambda t: edited(t, 0, 0.0)), "not zero"),
    "a NaN scale": (lambda: attack("bitmask", "scales", lambda t: edited(t, 3, float("nan"))), "finite"),
    "an infinite scale": (lambda: attack("two_of_four", "scales", lambda t: edited(t, 1, float("inf"))), "finite"),
    "an infinite float16 scale": (
        lambda: attack("columns", "scales", lambda t: edited(t, 1, 1e9), scale_type="float16"),
        "finite",
    ),
    "scales of another type": (lambda: attack("dense", "scales", lambda t: t.half()), "expected bfloat16"),
    "a scale per row": (lambda: attack("dense", "scales", lambda t: t[:, :1].clone()), r"bfloat16 \[9, 2\]"),
    "scales missing": (lambda: attack("dense", "scales", lambda t: t[:-1].clone()), r"bfloat16 \[9, 2\]"),
    "a zero point of 16": (
        lambda: attack("bitmask", "zeros", lambda t: edited(t, 0, 16), symmetric=False),
        "one of the codes 0 to 15",
    ),
    "signed zero points": (
        lambda: attack("dense", "zeros", lambda t: t.to(torch.int8), symmetric=False),
        "expected uint8",
    ),
    "no zero points": (
        lambda: dataclasses.replace(packed("dense"), encoding=Int4(symmetric=False)),
        "expected the tensors",
    ),
    "zero points of a symmetric matrix": (
        lambda: dataclasses.replace(packed("dense", symmetric=False), encoding=Int4()),
        "expected the tensors",
    ),
    "another group": (lambda: dataclasses.replace(packed("dense"), encoding=Int4(64)), r"bfloat16 \[9, 1\]"),
    "a group that does not divide the row": (
        lambda: dataclasses.replace(packed("dense"), encoding=Int4(128)),
        "groups of 128 do not divide a row of 64",
    ),
    "whole bytes": (lambda: attack("dense", "values", lambda t: t.repeat(1, 2)), r"uint8 \[9, 32\]"),
    "signed bytes": (lambda: attack("dense", "values", lambda t: t.view(torch.int8)), "expected uint8"),
    "columns, half a byte beyond": (lambda: attack("columns", "values", full), "behind the last of 9"),
    "bitmask, half a byte beyond": (lambda: attack("bitmask", "values", full), "behind the last of"),
    "csr, half a byte beyond": (lambda: attack("csr", "values", full), "behind the last of"),
    "coo, half a byte beyond": (lambda: attack("coo", "values", full), "behind the last of"),
    "bitmask, a byte missing": (lambda: attack("bitmask", "values", lambda t: t[:-1].clone()), "values are kept, but"),
    "bitmask, a byte left over": (lambda: attack("bitmask", "values", lambda t: t.repeat(2)), "values are kept, but"),
    "bitmask, far fewer": (lambda: attack("bitmask", "offsets", lambda t: edited(t, -1, 1)), "1 values are kept"),
    "bitmask, less than none": (lambda: attack("bitmask", "offsets", lambda t: edited(t, -1, -7)), "-7 values"),
    "bitmask, far too many": (lambda: attack("bitmask", "offsets", lambda t: edited(t, -1, 2**62)), "values are kept"),
    "bitmask, a bit too many": (lambda: attack("bitmask", "masks", lambda t: edited(t, 0, 255)), "offsets disagree"),
    "csr, a column missing": (lambda: attack("csr", "columns", lambda t: t[:-1].clone()), "columns for"),
    "block, values beyond": (lambda: attack("block", "values", lambda t: t.fill_(0x11)), "outside 9 x 64"),
    "two_of_four, a value below": (lambda: attack("two_of_four", "values", lambda t: edited(t, -1, 1)), "outside 9"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_contradiction_is_refused(name):
    make, words = ATTACKS[name]
    found = make()
    with pytest.raises((CorruptFile, InvalidInput), match=words):
        format_of(found).unpack(found)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_contradiction_whose_every_hash_is_right_is_refused(tmp_path, name):
    """An attacker computes hashes too."""
    make, words = ATTACKS[name]
    path = tmp_path / "packed.safetensors"
    packed_file.write(path, {"a": make()})
    with pytest.raises(CorruptFile, match=words):
        packed_file.read(path)


def test_without_its_name_it_is_taken_for_int8_and_refused():
    source = packed("dense")
    entry = {**packed_file.describe(source)}
    del entry["encoding"], entry["hash"]
    entry["hash"] = packed_file.entry_hash(entry)
    with pytest.raises(CorruptFile, match=r"expected int8 \[9, 64\], found uint8 \[9, 32\]"):
        packed_file.restore("a file", entry, source.tensors)


OPTIONS = ({"group": 33}, {"group": "32"}, {"scale_type": "int8"}, {"symmetric": 3}, {"bits": 4})


@pytest.mark.parametrize("options", OPTIONS)
def test_options_from_a_stranger_are_checked(options):
    source = packed("dense")
    entry = {**packed_file.describe(source), "encoding": {"int4": options}}
    entry["hash"] = packed_file.entry_hash({key: value for key, value in entry.items() if key != "hash"})
    with pytest.raises(CorruptFile, match=r"int4|group"):
        packed_file.restore("a file", entry, source.tensors)
