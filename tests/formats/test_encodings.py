"""Encodings: int8 by the definition, and one more, with options and zero points, that works wherever encodings do."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors import safe_open

from sparity import registry
from sparity.checkpoints import packed_file
from sparity.engine.kernels import gpu_weight, native_weight, prepare
from sparity.engine.kernels.fastest import fastest_format
from sparity.engine.kernels.prepared import case_of
from sparity.engine.kernels.smallest import smallest_format
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats import Encoding, build_encoding, build_format, unpack
from sparity.formats.conversions import convert
from sparity.formats.encodings.int8 import Int8
from sparity.formats.encodings.same import Same
from sparity.recipe import Recipe

FORMATS = ("dense", "bitmask", "two_of_four", "block", "csr", "coo")
STAGES = {"stages": [{"prune": {"score": "magnitude"}}]}


@dataclass(frozen=True)
class Grouped(Encoding):
    """A byte per value, with a scale and a lowest value for each `group` columns of a row; code 0 is +0."""

    group: int = 16

    def __post_init__(self):
        if self.group < 1:
            raise InvalidInput(f"encoding grouped: a group has at least one column, not {self.group}")

    def stored(self, dtype):
        return torch.uint8

    def side_tensors(self, rows, columns):
        shape = (rows, -(-columns // self.group))
        return {"scales": (torch.float32, shape), "lowest": (torch.float32, shape)}

    def encode(self, weight):
        blocks = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % self.group))
        blocks = blocks.unflatten(1, (-1, self.group))
        lowest, highest = blocks.amin(2), blocks.amax(2)
        scales = ((highest - lowest) / 254).clamp(min=1e-30)
        codes = ((blocks - lowest[..., None]) / scales[..., None]).round() + 1
        codes = codes.flatten(1)[:, : weight.shape[1]] * (weight != 0)
        return codes.to(torch.uint8), {"scales": scales, "lowest": lowest}

    def decode(self, values, sides, dtype):
        scales, lowest = (
            sides[name].repeat_interleave(self.group, 1)[:, : values.shape[1]] for name in ("scales", "lowest")
        )
        return torch.where(values == 0, 0.0, (values.float() - 1) * scales + lowest).to(dtype)

    def largest_error(self, weight):
        return self.encode(weight)[1]["scales"].repeat_interleave(self.group, 1)[:, : weight.shape[1]]

    def check(self, what, values, sides):
        if not bool((sides["scales"] > 0).all()):
            raise CorruptFile(f"{what}: scales must be above zero")


@pytest.fixture(autouse=True)
def grouped():
    registry.register("encoding", "grouped")(Grouped)
    yield
    del registry._registered["encoding", "grouped"]


def weight(rows=13, columns=70):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, columns, generator=generator)
    order = torch.rand(rows, -(-columns // 4), 4, generator=generator).argsort(-1)
    dense[(order >= 2).flatten(1)[:, :columns]] = 0
    return dense.bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_int8_by_its_definition(dtype):
    dense = weight().to(dtype)
    dense[3] = 0
    values, sides = Int8().encode(dense)
    for row in range(len(dense)):
        largest = dense[row].float().abs().max()
        scale = torch.tensor(1.0) if largest == 0 else largest / 127
        assert sides["scales"][row] == scale
        for column in range(dense.shape[1]):
            code = (dense[row, column].float() / scale).round()
            assert values[row, column] == code
            assert Int8().decode(values, sides, dtype)[row, column] == (code * scale).to(dtype)


def test_int8_and_same_say_what_they_are():
    assert (Same().exact, Int8().exact, Int8().integer_products) == (True, False, True)
    assert [Same().bits(dtype) for dtype in (torch.float32, torch.bfloat16)] == [32, 16]
    assert Int8().bits(torch.float32) == 8
    assert (Same().words(torch.float16), Int8().words(torch.float16)) == ("float16", "int8")
    assert (Same().spec, Int8().spec, Grouped(8).spec) == ("same", "int8", {"grouped": {"group": 8}})
    assert Int8().side_tensors(5, 7) == {"scales": (torch.float32, (5,))}
    assert Int8().largest_error(torch.tensor([[12.7, 0.0]])).tolist()[0] == pytest.approx([0.05, 0.05], rel=1e-4)


def test_another_encoding_is_known_by_name_and_by_its_options():
    assert registry.names("encoding") == ["grouped", "int4", "int8", "same"]
    assert build_encoding({"grouped": {"group": 4}}) == Grouped(4)
    with pytest.raises(InvalidInput, match='encoding "grouped" has no option "grup"; did you mean "group"'):
        build_encoding({"grouped": {"grup": 4}})
    packed = {"format": "packed", "values": {"grouped": {"group": 8}}}
    assert Recipe.read({**STAGES, "output": packed}).output.values == {"grouped": {"group": 8}}
    with pytest.raises(InvalidInput, match=r'output\.values: no encoding "groupd"; did you mean "grouped"'):
        Recipe.read({**STAGES, "output": {"format": "packed", "values": "groupd"}})
    with pytest.raises(InvalidInput, match=r"output\.values: encoding grouped: a group has at least one column"):
        Recipe.read({**STAGES, "output": {"format": "packed", "values": {"grouped": {"group": 0}}}})
    schema = Recipe.model_json_schema()["$defs"]["Output"]["properties"]["values"]
    assert schema["anyOf"][0]["enum"] == ["grouped", "int4", "int8", "same"]


@pytest.mark.parametrize("name", FORMATS)
def test_another_encoding_in_every_format_and_in_a_file(name, tmp_path):
    dense, encoding = weight(), Grouped(8)
    stored, sides = encoding.encode(dense)
    form = build_format(name)
    packed = form.pack(dense, encoding)
    back = unpack(packed)
    assert torch.equal(back, encoding.decode(stored, sides, dense.dtype))
    assert torch.equal(back == 0, dense == 0)
    assert packed.nbytes == form.nbytes((13, 70), form.count(stored), torch.bfloat16, encoding)
    assert convert(packed, "csr").tensors["lowest"].shape == (13, 9)
    path = tmp_path / "one.safetensors"
    packed_file.write(path, {"one": packed})
    found = packed_file.read(path)["one"]
    assert found.encoding == encoding
    assert torch.equal(unpack(found), back)
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(prepare(packed)(x), x @ back.T)  # no kernel takes it: it is unpacked for the product


def entry(packed, path):
    packed_file.write(path, {"one": packed})
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["sparity"])["matrices"]["one"]


def test_a_file_names_only_an_encoding_that_its_tensors_do_not_tell(tmp_path):
    form, path = build_format("bitmask"), tmp_path / "one.safetensors"
    assert "encoding" not in entry(form.pack(weight()), path)
    assert "encoding" not in entry(form.pack(weight(), "int8"), path)
    assert entry(form.pack(weight(), Grouped(8)), path)["encoding"] == {"grouped": {"group": 8}}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"grouped": {"group": 16}}, r"expected float32 \[13, 5\], found float32 \[13, 9\]"),
        ({"grouped": {"group": 0}}, "a group has at least one column"),
        ({"grouped": {"group": 8.5}}, "expected int, got 8.5"),
        ({"grouped": {"groups": 8}}, 'no option "groups"'),
        ({"grouper": {}}, 'no encoding "grouper"; did you mean "grouped"'),
        ({"base": {}}, 'no encoding "base"'),
        ({}, "give a name or"),
        (["grouped"], "give a name or"),
        (None, "give a name or"),
        ("same", "expected the tensors"),
        ("int8", "expected the tensors"),
    ],
)
def test_a_file_that_lies_about_its_encoding_is_refused(said, words):
    packed = build_format("bitmask").pack(weight(), Grouped(8))
    lie = {**packed_file.describe(packed), "encoding": said}
    lie["hash"] = packed_file.entry_hash({key: value for key, value in lie.items() if key != "hash"})
    with pytest.raises(CorruptFile, match=words):
        packed_file.restore("a file", lie, packed.tensors)


def test_contents_that_an_encoding_does_not_write_are_refused():
    packed = build_format("csr").pack(weight(), Grouped(8))
    broken = replace(packed, tensors={**packed.tensors, "scales": torch.zeros_like(packed.tensors["scales"])})
    with pytest.raises(CorruptFile, match="csr: scales must be above zero"):
        unpack(broken)


def test_choices_among_formats_ask_what_kernels_take():
    dense = weight(64, 128)
    assert smallest_format(dense, "int8").name == smallest_format(dense).name == "two_of_four"
    scattered = dense * 1
    scattered[:, :3] = 1
    assert smallest_format(scattered, "int8").name == "bitmask"
    few = torch.zeros(64, 128).bfloat16()
    few[5, 7] = 1
    assert smallest_format(few).name == "bitmask"  # csr and coo have no kernels
    assert smallest_format(few, Grouped(8)).name == "coo"  # nor has any format with these values: all compete
    packed = build_format("bitmask").pack(dense, Grouped(8))
    assert "grouped values" in (native_weight.declines(packed) or "") or native_weight.native.unavailable()
    assert gpu_weight.declines(packed) == "no kernel for the format bitmask with grouped values"
    assert (case_of(packed, 1, 2).values, case_of(packed, 1, 2).bits) == ("grouped group 8", 8)
    assert fastest_format(dense, Grouped(8)).format.name == "dense"
