"""The laws of a format and of an encoding, for every one that the registry finds."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity import registry
from sparity.checkpoints import packed_file
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats import build_encoding, build_format, format_of
from sparity.formats.conversions import convert
from sparity.formats.storage.values import bits

FORMATS, ENCODINGS = registry.names("format"), registry.names("encoding")
SPECS = [*ENCODINGS, {"int4": {"group": 64, "symmetric": False}}, {"int4": {"group": 128, "scale_type": "float16"}}]
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


def whole(encoding, shape):
    """The shape, its columns filled up to whole groups of the encoding."""
    group = getattr(build_encoding(encoding), "group", 1)
    return shape[0], -(-shape[1] // group) * group


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
@pytest.mark.parametrize("values", ENCODINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_packed_weight_is_what_its_encoding_gives_back_and_its_bytes_are_known_before(name, values, dtype, shape):
    shape = whole(values, shape)
    weight = two_of_four(shape, dtype=dtype)
    form, encoding = build_format(name), build_encoding(values)
    stored, sides = encoding.encode(weight)
    packed = form.pack(weight, values)
    assert same_bits(form.unpack(packed), encoding.decode(stored, sides, dtype))
    assert packed.nbytes == form.nbytes(shape, form.count(stored), dtype, values)
    assert packed.tensors["values"].element_size() * 8 == encoding.bits(dtype) * (2 if encoding.half_bytes else 1)
    assert (packed.encoding, packed.quantized, packed.pair) == (encoding, not encoding.exact, (name, encoding.name))
    assert same_bits(form.stored(packed), stored)
    assert packed.sides.keys() == sides.keys()
    assert all(torch.equal(packed.tensors[part], sides[part]) for part in sides)


@pytest.mark.parametrize("values", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_encoding_keeps_its_bound_its_zeros_and_the_types_it_declares(values, dtype, shape):
    encoding, shape = build_encoding(values), whole(values, shape)
    weight = two_of_four(shape, dtype=dtype) * torch.logspace(-4, 3, shape[0])[:, None].to(dtype)
    weight[0, 0] = -0.0
    before = weight.clone()
    stored, sides = encoding.encode(weight)
    back = encoding.decode(stored, sides, dtype)
    assert same_bits(weight, before)
    assert back.dtype == dtype
    assert (stored.shape, stored.dtype) == (shape, encoding.stored(dtype))
    assert {name: (side.dtype, side.shape) for name, side in sides.items()} == encoding.side_tensors(*shape)
    assert all(side.is_contiguous() for side in sides.values())
    assert not bits(stored)[bits(weight) == 0].any()
    assert not bits(back)[bits(weight) == 0].any()  # +0, not -0
    assert not back[weight == 0].any()
    error = (back.double() - weight.double()).abs()
    assert bool((error <= encoding.largest_error(weight).double()).all())
    assert same_bits(back, weight) or not encoding.exact
    encoding.check("the matrix", stored, sides)
    again = encoding.decode(torch.zeros_like(stored), sides, dtype)
    assert not bits(again).any()  # what a format leaves out


@pytest.mark.parametrize("values", ENCODINGS)
@pytest.mark.parametrize("odd", ["nan", "inf", "-inf"])
def test_an_encoding_brings_back_what_is_not_finite_or_refuses_it(values, odd):
    encoding = build_encoding(values)
    weight = torch.nn.functional.pad(torch.tensor([[1.0, float(odd)]]), (0, 30))
    if encoding.exact:
        assert same_bits(encoding.decode(*encoding.encode(weight), weight.dtype), weight)
    else:
        with pytest.raises(InvalidInput, match=f"{values} values cannot hold NaN or infinity"):
            encoding.encode(weight)


@pytest.mark.parametrize("values", ENCODINGS)
def test_an_encoding_is_built_from_what_it_says_and_its_tensors_have_names_of_their_own(values):
    encoding = build_encoding(values)
    assert build_encoding(encoding.spec) == build_encoding(encoding) == encoding
    assert json.loads(json.dumps(encoding.spec)) == encoding.spec
    for name in FORMATS:
        layout = build_format(name).layout(8, 64, encoding.stored(torch.bfloat16))
        assert not layout.keys() & encoding.side_tensors(8, 64).keys()


@pytest.mark.parametrize("values", SPECS, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_gives_back_format_encoding_and_tensors(name, values, tmp_path):
    packed = build_format(name).pack(two_of_four(whole(values, (13, 70))), values)
    packed_file.write(tmp_path / "one.safetensors", {"one": packed})
    found = packed_file.read(tmp_path / "one.safetensors")["one"]
    assert (found.pair, found.encoding, found.options) == (packed.pair, packed.encoding, packed.options)
    assert found.tensors.keys() == packed.tensors.keys()
    assert all(torch.equal(found.tensors[part], packed.tensors[part]) for part in packed.tensors)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("values", [spec for spec in SPECS if "float16'" not in str(spec)], ids=str)
def test_any_finite_matrix_keeps_the_bound(values, data):
    rows, columns = whole(values, (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))))
    words = data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=40))
    flat = torch.tensor(words, dtype=torch.int16).repeat(-(-rows * columns // len(words)))[: rows * columns]
    weight = flat.view(rows, columns).contiguous().view(torch.bfloat16)
    weight[~weight.isfinite()] = 0
    encoding = build_encoding(values)
    back = encoding.decode(*encoding.encode(weight), weight.dtype)
    assert bool(((back.double() - weight.double()).abs() <= encoding.largest_error(weight).double()).all())
    assert not bits(back)[bits(weight) == 0].any()


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
    with pytest.raises(InvalidInput, match='no encoding "int5"; did you mean "int'):
        form.pack(torch.eye(4), values="int5")


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_in_another_format_is_refused(name):
    other = build_format("csr" if name == "dense" else "dense").pack(torch.eye(4))
    with pytest.raises(CorruptFile, match="was given to"):
        build_format(name).unpack(other)


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("values", ENCODINGS)
def test_every_conversion_equals_packing_directly(source, target, values):
    weight = two_of_four(whole(values, (13, 70)))
    converted = convert(build_format(source).pack(weight, values), target)
    direct = build_format(target).pack(weight, values)
    assert converted.tensors.keys() == direct.tensors.keys()
    assert same_bits(build_format(target).stored(converted), build_format(target).stored(direct))
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
