"""The laws of a format, for every one that the registry finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity import registry
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats import build_format, format_of
from sparity.formats.conversions import convert
from sparity.formats.storage.values import bits, quantize

FORMATS = registry.names("format")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (1, 200), (200, 1), (3, 65), (4, 64), (5, 63), (17, 130), (33, 96))
ODD = (-0.0, float("nan"), float("inf"), float("-inf"), 1e-40)


def two_of_four(shape, seed=0, dtype=torch.bfloat16):
    """A matrix that every format can hold."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    order = torch.rand(shape[0], -(-shape[1] // 4), 4, generator=generator).argsort(-1)
    weight[(order >= 2).flatten(1)[:, : shape[1]]] = 0
    weight[torch.rand(shape, generator=generator) < 0.2] = 0
    return weight.to(dtype)


def same_bits(first, second):
    return first.dtype == second.dtype and torch.equal(bits(first), bits(second))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_gives_back_every_bit_and_the_bytes_are_known_before(name, dtype, shape):
    weight = two_of_four(shape, dtype=dtype)
    for place, value in enumerate(ODD):
        if place < shape[0]:
            weight[place, (5 * place) % shape[1]] = value
    form = build_format(name)
    if not form.matches(weight):
        weight = two_of_four(shape, dtype=dtype)
    before = weight.clone()
    packed = form.pack(weight)
    assert same_bits(form.unpack(packed), before)
    assert same_bits(weight, before)
    assert packed.nbytes == form.nbytes(shape, form.count(weight), dtype)
    assert packed.shape == shape
    assert format_of(packed) == form
    if form.count(weight):  # the packed matrix is its own memory
        weight.zero_()
        assert same_bits(form.unpack(packed), before)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_equals_quantise_and_dequantise(name, dtype, shape):
    weight = two_of_four(shape, dtype=dtype)
    form = build_format(name)
    packed = form.pack(weight, values="int8")
    scales = weight.float().abs().amax(1) / 127
    scales[scales == 0] = 1
    reference = ((weight.float() / scales[:, None]).round() * scales[:, None]).to(dtype)
    assert torch.equal(form.unpack(packed), reference)
    assert packed.nbytes == form.nbytes(shape, form.count(quantize(weight)[0]), dtype, "int8")
    assert packed.quantized


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fill", [0.0, -0.0, float("nan"), 1.5])
def test_all_zero_all_dense_and_empty_rows(name, fill):
    form = build_format(name)
    weight = torch.full((10, 70), fill)
    if form.matches(weight):
        assert same_bits(form.unpack(form.pack(weight)), weight)
    weight[2:9] = 0
    weight[:, 2:] = 0
    assert same_bits(form.unpack(form.pack(weight)), weight)


@pytest.mark.parametrize("name", FORMATS)
def test_what_cannot_be_packed_is_refused(name):
    form = build_format(name)
    for weight in (torch.ones(4), torch.ones(0, 4), torch.ones(2, 2, dtype=torch.float64), torch.eye(4).to_sparse()):
        with pytest.raises(InvalidInput, match="a weight to pack is"):
            form.pack(weight)
    with pytest.raises(InvalidInput, match="NaN or infinity"):
        form.pack(torch.tensor([[1.0, float("nan"), 0.0, 0.0]]), values="int8")
    with pytest.raises(InvalidInput, match='"same" or "int8"'):
        form.pack(torch.eye(4), values="int4")


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_in_another_format_is_refused(name):
    other = build_format("csr" if name == "dense" else "dense").pack(torch.eye(4))
    with pytest.raises(CorruptFile, match="was given to"):
        build_format(name).unpack(other)


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("values", ["same", "int8"])
def test_every_conversion_equals_packing_directly(source, target, values):
    weight = two_of_four((13, 70))
    converted = convert(build_format(source).pack(weight, values), target)
    direct = build_format(target).pack(weight, values)
    assert converted.tensors.keys() == direct.tensors.keys()
    assert all(same_bits(converted.tensors[part], direct.tensors[part]) for part in ("values",))
    assert all(
        torch.equal(converted.tensors[part], direct.tensors[part]) for part in direct.tensors if part != "values"
    )


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_matrix_comes_back(name, data):
    rows, columns = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 150))
    words = data.draw(st.lists(st.sampled_from((0, 0, 0, 1, -1, -32768, 32767, 16256)), min_size=1, max_size=40))
    flat = torch.tensor(words, dtype=torch.int16).repeat(-(-rows * columns // len(words)))[: rows * columns]
    weight = flat.view(rows, columns).contiguous().view(torch.bfloat16)
    form = build_format(name)
    if form.matches(weight):
        assert same_bits(form.unpack(form.pack(weight)), weight)
    else:
        with pytest.raises(InvalidInput, match="prune with the pattern 2:4"):
            form.pack(weight)
