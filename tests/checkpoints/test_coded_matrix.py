"""Matrices under a Huffman code: every bit back, in every format and encoding, and never more bytes than without."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sparity import registry
from sparity.checkpoints import packed_file
from sparity.checkpoints.coded_matrix import chosen_layout, code_of, coded
from sparity.formats import build_format, format_of
from sparity.formats.storage.values import bits

SPECS = ["same", "int8", "int4", {"int4": {"symmetric": False}}]


def few_values(rows=64, columns=256, dtype=torch.bfloat16, values=15, keep=0.5):
    """A matrix of a few values, two of every four kept at most, so that every format can hold it."""
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(values, generator=generator)
    weight = book[torch.randint(values, (rows, columns), generator=generator).clamp(min=2)]
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    weight[(order >= 4 * keep).flatten(1)] = 0
    return weight.to(dtype)


def spread(count, size=4096, places=None):
    """`[1, size]`, zeros but for `count` ones, evenly spread, or at `places`."""
    weight = torch.zeros(1, size)
    weight[0, torch.arange(0, size, size // count) if places is None else places] = 1
    return weight


def parts_of(weight, name="dense"):
    stored, said = coded(build_format(name).pack(weight))
    return {part: tensor.tolist() for part, tensor in stored.items()}, said


def layouts(packed):
    """Both layouts written plainly: all values, or those that are not 0 with gaps up to 255, the last to the end."""
    flat, kept, gaps, behind = bits(format_of(packed).stored(packed)).flatten().tolist(), [], [], 0
    for place, value in enumerate(flat):
        behind += 1
        if value or behind == 255 or place == len(flat) - 1:
            kept.append(value)
            gaps.append(behind)
            behind = 0
    return {"all": {"values": flat}, "gaps": {"values": kept, "gaps": gaps}}


def test_all_weights_by_hand():
    weight = torch.tensor([[0.0, 1.0, 1.0, 0.0, 2.0, 0.0, 0.0, 3.0] * 1024])  # 1/2, 1/4, 1/8, 1/8: 1.75 bits
    parts, said = parts_of(weight)
    assert said == {"layout": "all", "count": 8192}
    assert parts.keys() == {"values_book", "values_code"}
    assert parts["values_book"] == [0.0, 1.0, 2.0, 3.0]
    code = parts["values_code"]
    assert code[:4] == [1, 2, 3, 3]
    assert code[4:36] == [896 % 256, 896 // 256] * 16  # 512 weights of 1.75 bits, 16 times
    assert code[36:38] == [0b01010011, 0b00011101]  # 0 10 10 0 110 0 0 111, and again: 0 1...
    assert len(code) == 36 + 8192 * 1.75 / 8


def test_gaps_by_hand():
    places = [4, 9, 10, 265, 600, *range(700, 40_000, 100)]
    parts, said = parts_of(spread(0, 40_000, places))
    assert said["layout"] == "gaps"
    assert parts["values_book"] == [0.0, 1.0]
    assert parts["gaps_book"] == [1, 5, 80, 99, 100, 255]  # 600 is 335 behind 265: 80 to a zero, then 255
    assert said["count"] == len(places) + 2  # that zero, and the last weight of the matrix, 99 behind the last one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_every_bit_comes_back(dtype, keep, tmp_path):
    weight = few_values(dtype=dtype, keep=keep)
    weight[0, :5] = torch.tensor([-0.0, float("nan"), float("-nan"), float("inf"), 1e-7])
    packed = build_format("bitmask").pack(weight)
    packed_file.write(tmp_path / "one.safetensors", {"one": packed}, huffman=True)
    found = packed_file.read(tmp_path / "one.safetensors")["one"]
    assert torch.equal(bits(format_of(found).unpack(found)), bits(weight))


@pytest.mark.parametrize("values", SPECS, ids=str)
@pytest.mark.parametrize("name", registry.names("format"))
@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_a_file_under_a_code_gives_back_the_same_tensors(name, values, keep, tmp_path):
    packed = build_format(name).pack(few_values(keep=keep), values)
    path, plain = tmp_path / "coded.safetensors", tmp_path / "plain.safetensors"
    packed_file.write(path, {"one.two": packed}, huffman=True)
    packed_file.write(plain, {"one.two": packed})
    stored, said = coded(packed)
    assert said
    assert path.stat().st_size < plain.stat().st_size
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {f"one.two.{part}" for part in stored}
    found = packed_file.read(path)["one.two"]
    assert (found.pair, found.encoding, found.options) == (packed.pair, packed.encoding, packed.options)
    assert found.tensors.keys() == packed.tensors.keys()
    assert all(torch.equal(found.tensors[part], packed.tensors[part]) for part in packed.tensors)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 150),
    values=st.integers(3, 40),
    name=st.sampled_from(("dense", "bitmask", "csr")),
)
def test_no_file_is_larger_for_it(tmp_path_factory, rows, columns, values, name):
    folder = tmp_path_factory.mktemp("sizes")
    part = few_values(64, 256, values=values)[:rows, :columns]
    packed = build_format(name).pack(part.clone(memory_format=torch.contiguous_format))
    for huffman in (False, True):
        packed_file.write(folder / str(huffman), {"model.layers.10.mlp.up_proj": packed}, huffman=huffman)
    assert (folder / "True").stat().st_size <= (folder / "False").stat().st_size
    found = packed_file.read(folder / "True")["model.layers.10.mlp.up_proj"]
    assert all(torch.equal(found.tensors[part], packed.tensors[part]) for part in packed.tensors)


@settings(max_examples=40, deadline=None)
@given(keep=st.floats(0.001, 1), seed=st.integers(0, 99), last=st.booleans())
def test_the_smaller_of_both_layouts_is_taken_and_gaps_lead_back(tmp_path_factory, keep, seed, last):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(1, 9, (20, 500), generator=generator).bfloat16()
    weight[torch.rand(20, 500, generator=generator) >= keep] = 0
    weight[-1, -1] = 3 if last else 0
    packed = build_format("dense").pack(weight)
    kinds = {"values": np.uint16, "gaps": np.uint8}
    wanted = {
        layout: sum(code_of(np.array(numbers).astype(kinds[part])).nbytes for part, numbers in parts.items())
        for layout, parts in layouts(packed).items()
    }
    layout, codes = chosen_layout(packed)
    assert layout == min(wanted, key=wanted.get)
    assert wanted[layout] == sum(code.nbytes for code in codes.values())
    path = tmp_path_factory.mktemp("layouts") / "one.safetensors"
    packed_file.write(path, {"one": packed}, huffman=True)
    assert torch.equal(packed_file.read(path)["one"].tensors["values"], weight)


@pytest.mark.parametrize("huffman", [False, True])
@pytest.mark.parametrize("name", registry.names("format"))
def test_nothing_but_zeros(name, huffman, tmp_path):
    weight = torch.zeros(64, 256, dtype=torch.bfloat16)
    packed_file.write(tmp_path / "one.safetensors", {"one": build_format(name).pack(weight)}, huffman=huffman)
    found = packed_file.read(tmp_path / "one.safetensors")["one"]
    assert torch.equal(format_of(found).unpack(found), weight)


def test_a_matrix_that_would_not_be_smaller_stays_as_it_is():
    many = torch.arange(70_000, dtype=torch.int32).view(torch.float32).view(7, -1)
    random = torch.randn(64, 64)
    for weight in (many, random, torch.zeros(1, 64)):
        packed = build_format("dense").pack(weight)
        assert coded(packed) == (packed.tensors, {})
        assert chosen_layout(packed) is None


def test_zero_as_one_of_the_symbols_is_no_larger_than_a_mask_and_the_others():
    """A bit for zero or not, then the kept value, is one prefix code of all values, and Huffman's is the best."""
    for keep in (0.25, 0.5):
        flat = bits(few_values(keep=keep)).numpy().reshape(-1)
        every, kept = code_of(flat), code_of(flat[flat != 0])
        assert every.counts @ every.lengths.astype(int) <= len(flat) + kept.counts @ kept.lengths.astype(int)
