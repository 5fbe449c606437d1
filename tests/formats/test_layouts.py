"""Each format's bytes, worked out by hand."""

import pytest
import torch

from sparity.errors import InvalidInput
from sparity.formats import build_format
from sparity.formats.encodings.int8 import Int8
from sparity.formats.storage import kept, tiles
from sparity.formats.storage.values import bits

WEIGHT = torch.tensor([[1.0, 0, 2, 0, 0, 3], [0, 0, 0, 0, 0, 0], [0, 4, 0, -0.0, 0, 0]])


def parts(name, weight=WEIGHT, **options):
    packed = build_format({name: options}).pack(weight)
    return {part: tensor.tolist() for part, tensor in packed.tensors.items()}


def test_csr_and_coo():
    assert parts("csr") == {"columns": [0, 2, 5, 1, 3], "offsets": [0, 3, 3, 5], "values": [1, 2, 3, 4, -0.0]}
    assert parts("coo") == {
        "rows": [0, 0, 0, 2, 2],
        "columns": [0, 2, 5, 1, 3],
        "values": [1, 2, 3, 4, -0.0],
    }


def test_columns():
    assert parts("columns") == {"values": [[1, 0, 0], [0, 0, 4], [2, 0, 0], [0, 0, -0.0], [0, 0, 0], [3, 0, 0]]}


def test_block():
    assert parts("block", rows=2, columns=4) == {
        "columns": [0, 1, 0],
        "offsets": [0, 2, 3],
        "values": [[[1, 0, 2, 0], [0, 0, 0, 0]], [[0, 3, 0, 0], [0, 0, 0, 0]], [[0, 4, 0, 0], [0, 0, 0, 0]]],
    }
    with pytest.raises(InvalidInput, match="sides between 1 and"):
        build_format({"block": {"rows": 0}})


def test_bitmask_one_group():
    empty = [0] * 7
    found = parts("bitmask")
    assert found["masks"] == [[[[0b100101, *empty], [0, *empty], [0b1010, *empty], [0, *empty]]]]
    assert found["offsets"] == [0, 5]
    assert found["values"] == [1, 2, 3, 4, -0.0]


def test_bitmask_order_is_tile_then_group_then_row():
    weight = torch.zeros(6, 70)
    weight[1, 65], weight[2, 3], weight[0, 69], weight[5, 0], weight[2, 66], weight[0, 63] = 1, 2, 3, 4, 5, 6
    found = build_format("bitmask").pack(weight).tensors
    assert found["values"].tolist() == [6, 2, 3, 1, 5, 4]  # tile 0: columns 0-63, then 64-69, each row by row; tile 1
    assert found["offsets"].tolist() == [0, 5, 6]
    assert found["masks"].shape == (2, 2, 4, 8)
    assert found["masks"][0, 0, 0].tolist() == [0, 0, 0, 0, 0, 0, 0, 128]
    assert found["masks"][0, 1, 2].tolist() == [4, 0, 0, 0, 0, 0, 0, 0]


def test_two_of_four_stores_two_of_each_group():
    weight = torch.zeros(1, 64)
    weight[0, :16] = torch.tensor([1.0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 4, 5, 0, 0, 6])
    found = build_format("two_of_four").pack(weight).tensors
    assert found["masks"].shape == (1, 1, 4, 8)
    assert found["masks"][0, 0, 0].tolist() == [0b0110_0011, 0b1001_1100, *[0b1100_1100] * 6]
    assert found["values"].shape == (1, 1, 4, 32)
    assert found["values"][0, 0, 0, :8].tolist() == [1, 2, 3, 0, 0, 4, 5, 6]
    assert bits(found["values"])[0, 0, 0, 8:].any() == 0


def test_two_of_four_says_where_it_does_not_fit():
    weight = torch.zeros(6, 40)
    weight[3, 20:23] = 1
    weight[5, 0:4] = -0.0  # a kept weight like any other
    form = build_format("two_of_four")
    assert not form.matches(weight)
    with pytest.raises(InvalidInput, match="row 3 keeps more than two of four weights near column 16, and 2 of 6 rows"):
        form.pack(weight)
    assert form.matches(torch.ones(5, 2))  # a narrower last group
    assert not form.matches(torch.ones(5, 3))


def test_sizes_that_are_promised():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 1024, generator=generator).bfloat16()
    dense = weight.numel() * 2
    half = weight.clone()
    half.view(-1, 4)[:, :2] = 0
    assert build_format("bitmask").pack(half).nbytes <= 0.58 * dense
    assert build_format("two_of_four").pack(half).nbytes <= 0.58 * dense
    assert build_format("two_of_four").pack(half, values="int8").nbytes <= 0.34 * dense
    assert build_format("bitmask").nbytes((4096, 4096), 2**23, torch.bfloat16) == 2**24 + 2**21 + 8 * 1025


def test_quantize_by_hand():
    values, sides = Int8().encode(torch.tensor([[127.0, -254, 1, 0], [0, 0, 0, 0], [0.5, -0.25, 0.1, -0.0]]))
    assert values.tolist() == [[64, -127, 0, 0], [0, 0, 0, 0], [127, -64, 25, 0]]  # 63.5 -> 64 and 0.5 -> 0, to even
    assert sides["scales"].tolist() == pytest.approx([2, 1, 0.5 / 127])
    assert Int8().decode(values, sides, torch.float32)[0].tolist() == [128, -254, 0, 0]
    tiny = torch.full((1, 2), 1e-44)
    assert Int8().encode(tiny)[0].tolist() == [[0, 0]]  # smaller than any scale: lost, not divided by zero


def test_tiles_and_kept_values_across_pieces(monkeypatch):
    monkeypatch.setattr(kept, "PIECE", 37)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(-3, 3, (11, 130), generator=generator, dtype=torch.int16)
    ordered = tiles.to_tiles(matrix)
    assert torch.equal(tiles.from_tiles(ordered, 11, 130), matrix)
    keep = ordered != 0
    assert torch.equal(tiles.from_masks(tiles.to_masks(keep)), keep)
    assert torch.equal(tiles.kept_per_tile(tiles.to_masks(keep)), keep.flatten(1).sum(1))
    assert torch.equal(kept.gather(ordered, keep), ordered[keep])
    assert torch.equal(kept.scatter(kept.gather(ordered, keep), keep), ordered)
    mask = matrix != 0
    assert torch.equal(kept.columns_of(mask), mask.nonzero()[:, 1].int())
    monkeypatch.delattr("numpy.bitwise_count", raising=False)  # numpy 1 has none
    assert torch.equal(tiles.kept_per_tile(tiles.to_masks(keep)), keep.flatten(1).sum(1))
