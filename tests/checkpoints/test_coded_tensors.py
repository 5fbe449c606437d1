"""Tensors under a Huffman code: every bit back, in every format and encoding, and never more bytes than without."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sparity import registry
from sparity.checkpoints import packed_file
from sparity.checkpoints.coded_tensors import code_of, coded, decoded, pieces
from sparity.formats import build_format, format_of
from sparity.formats.storage.values import bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.int64)
SPECS = ["same", "int8", {"int4": {"symmetric": False}}]


def few_values(rows=64, columns=256, dtype=torch.bfloat16, values=15, keep=0.5):
    """A matrix of a few values, two of every four kept at most, so that every format can hold it."""
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(values, generator=generator)
    weight = book[torch.randint(values, (rows, columns), generator=generator).clamp(min=2)]
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    weight[(order >= 4 * keep).flatten(1)] = 0
    return weight.to(dtype)


def number_of(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_a_tensor_comes_back(dtype):
    tensor = torch.arange(9000).remainder(7).to(dtype).view(10, 30, 30)
    if dtype.is_floating_point:
        tensor[0, 0, :5] = torch.tensor([-0.0, float("nan"), float("-nan"), float("inf"), 1e-7])
    stored, shapes = coded({"a": tensor})
    assert (set(stored), shapes) == (set(pieces("a")), {"a": [10, 30, 30]})
    assert number_of(stored) == code_of(tensor).nbytes
    assert stored["a_book"].dtype == dtype
    back = decoded("a file", stored, shapes)["a"]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_the_bytes_by_hand():
    tensor = torch.tensor([0.0, 1.0, 1.0, 0.0, 2.0, 0.0, 0.0, 3.0] * 1024)  # 1/2, 1/4, 1/8, 1/8: 1.75 bits
    stored, _ = coded({"a": tensor})
    assert stored["a_book"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert stored["a_lengths"].tolist() == [1, 2, 3, 3]
    assert stored["a_sizes"].tolist() == [896] * 16  # 512 numbers of 1.75 bits
    assert stored["a_stream"].nbytes == 8192 * 1.75 / 8
    assert stored["a_stream"][:2].tolist() == [0b01010011, 0b00011101]  # 0 10 10 0 110 0 0 111, and again: 0 1...


def test_a_tensor_that_would_not_be_smaller_stays_as_it_is():
    many = torch.arange(70_000, dtype=torch.int32)
    random = torch.randint(256, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    few, empty = torch.zeros(200), torch.zeros(0)
    stored, shapes = coded({"many": many, "random": random, "few": few, "empty": empty})
    assert (set(stored), shapes) == ({"many", "random", "few", "empty"}, {})
    assert stored["many"] is many
    assert torch.equal(decoded("a file", stored, {})["few"], few)


@pytest.mark.parametrize("values", SPECS, ids=str)
@pytest.mark.parametrize("name", registry.names("format"))
def test_a_file_under_a_code_gives_back_the_same_tensors(name, values, tmp_path):
    packed = build_format(name).pack(few_values(), values)
    path, plain = tmp_path / "coded.safetensors", tmp_path / "plain.safetensors"
    packed_file.write(path, {"one.two": packed}, huffman=True)
    packed_file.write(plain, {"one.two": packed})
    expected, shapes = coded(packed.tensors)
    assert "values" in shapes or packed.encoding.half_bytes  # two codes in a byte hardly ever come again together
    assert path.stat().st_size < plain.stat().st_size + (not shapes)
    found = packed_file.read(path)["one.two"]
    assert (found.pair, found.encoding, found.options) == (packed.pair, packed.encoding, packed.options)
    assert found.tensors.keys() == packed.tensors.keys()
    assert all(torch.equal(found.tensors[part], packed.tensors[part]) for part in packed.tensors)
    assert torch.equal(bits(format_of(found).unpack(found)), bits(format_of(packed).unpack(packed)))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {f"one.two.{part}" for part in expected}


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


def test_zero_as_one_of_the_symbols_is_no_larger_than_a_mask_and_the_others():
    """A bit for zero or not, then the kept value, is one prefix code of all values, and Huffman's is the best."""
    for keep in (0.25, 0.5):
        weight = few_values(keep=keep)
        dense = code_of(weight)
        mask, kept = weight.numel() / 8, code_of(weight[weight != 0])
        assert dense.counts @ dense.lengths <= 8 * mask + kept.counts @ kept.lengths
