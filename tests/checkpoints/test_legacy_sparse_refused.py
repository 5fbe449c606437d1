"""Old sparse layouts that contradict themselves, or that Sparity does not read: refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sparity
from orphaned_folders import TWO_OF_FOUR, orphan, parts, read, say
from sparity.checkpoints.source import CheckpointSource
from sparity.errors import CorruptFile, InvalidInput, SparityError, UnsupportedModel
from sparity.formats.conversions.compressed_tensors import BITMASK, PARTS, restore
from sparity.pipeline.run.packing import convert

LAYOUTS = tuple(PARTS)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"config_groups": {"group_0": {}}, "format": "int-quantized"}, r"already quantised \(config_groups, format\)"),
        ({"format": "marlin-24", "config_groups": {"group_0": {}}}, "already quantised"),
        ({"kv_cache_scheme": {"num_bits": 8}}, r"already quantised \(kv_cache_scheme\)"),
        ({"transform_config": {"config_groups": {"a": 1}}}, r"already quantised \(transform_config\)"),
    ],
)
def test_sparse_and_quantised_is_refused(sparse, tmp_path, said, words):
    folder = orphan(sparse, tmp_path / "old", BITMASK)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(said)
    (folder / "config.json").write_text(json.dumps(config))
    for use in (sparity.load, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(UnsupportedModel, match=words):
            use(folder)


@pytest.mark.parametrize("layout", ["sparse-csr", "marlin-24", None, 5, ["sparse-bitmask"]])
def test_another_layout_is_refused(sparse, tmp_path, layout):
    folder = orphan(sparse, tmp_path / "old", BITMASK)
    say(folder, format=layout)
    with pytest.raises(UnsupportedModel, match="is not supported, only sparse-bitmask, sparse-24-bitmask"):
        sparity.load(folder)


def test_a_conversion_that_says_nothing_is_refused(sparse, tmp_path):
    folder = orphan(sparse, tmp_path / "old", BITMASK)
    with pytest.raises(InvalidInput, match="a plain checkpoint has none"):
        convert(folder, tmp_path / "out", values="int8", to="plain")
    with pytest.raises(InvalidInput, match="is plain already"):
        convert(sparse, tmp_path / "out", to="plain")
    convert(folder, tmp_path / "packed")
    with pytest.raises(InvalidInput, match="is packed already"):
        convert(tmp_path / "packed", tmp_path / "out", to="packed")
    assert not (tmp_path / "out").exists()


NAME = "model.layers.1.mlp.up_proj"  # [64, 32]


def first(tensor, value):
    return torch.cat((torch.full_like(tensor.reshape(-1)[:1], value), tensor.reshape(-1)[1:])).reshape(tensor.shape)


DAMAGES = {
    "a bit more": ("bitmask", lambda t: first(t, 255), "it keeps|exactly two"),
    "a bit less": ("bitmask", lambda t: first(t, 0), "it keeps|exactly two"),
    "other masks": ("bitmask", lambda t: t.to(torch.int32), r"bitmask: expected uint8 \[64, 4\]"),
    "flat masks": ("bitmask", lambda t: t.flatten(), r"bitmask: expected uint8 \[64, 4\]"),
    "no masks": ("bitmask", lambda t: t[:0], r"bitmask: expected uint8 \[64, 4\]"),
    "values missing": ("compressed", lambda t: t.flatten()[:-1], "it keeps 1024|cannot be the values"),
    "values twice": ("compressed", lambda t: torch.cat((t, t)), "it keeps 1024|cannot be the values"),
    "more values than weights": ("compressed", lambda t: t.flatten().repeat(3), "cannot be the values"),
    "whole numbers": ("compressed", lambda t: t.to(torch.int16), "int16 .* cannot be the values"),
    "wide values": ("compressed", lambda t: t.double(), "float64 .* cannot be the values"),
    "a huge shape": ("shape", lambda t: first(t, 2**62), "cannot be"),
    "a tall shape": ("shape", lambda t: first(t, 2**31 - 1), "bitmask: expected uint8"),
    "a negative shape": ("shape", lambda t: first(t, -64), "cannot be"),
    "an empty shape": ("shape", lambda t: first(t, 0), "cannot be"),
    "another shape": ("shape", lambda t: first(t, 63), "expected uint8"),
    "a floating shape": ("shape", lambda t: t.float(), "its shape is stored as"),
    "a shape of many": ("shape", lambda t: t.flatten().repeat(1000), "its shape is stored as"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_contradiction_is_refused(sparse, tmp_path, layout, name):
    part, change, words = DAMAGES[name]
    folder = orphan(sparse, tmp_path / "old", layout)
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"]).contiguous()
    save_file(tensors, shard)
    with pytest.raises(CorruptFile, match=rf"{NAME}.*({words})"):
        read(folder)
    with pytest.raises(SparityError):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("offset", "value"), [(0, 1), (1, -1), (5, 2**62), (63, 0)], ids=["start", "negative", "far", "falling"]
)
def test_wrong_row_offsets_are_refused(sparse, tmp_path, offset, value):
    folder = orphan(sparse, tmp_path / "old", BITMASK)
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    tensors[f"{NAME}.row_offsets"][offset] = value
    save_file(tensors, shard)
    with pytest.raises(CorruptFile, match="row_offsets: they disagree"):
        read(folder)


def test_a_weight_behind_the_last_column_is_refused():
    made = parts(torch.ones(2, 9), BITMASK)
    made["bitmask"] = torch.from_numpy(np.array([[255, 3], [255, 1]], dtype=np.uint8))
    with pytest.raises(CorruptFile, match="behind the last of 9 columns"):
        restore(BITMASK, (2, 9), made)
    with pytest.raises(CorruptFile, match="in whole fours"):
        restore(TWO_OF_FOUR, (3, 3), parts(torch.ones(3, 4), TWO_OF_FOUR))
    with pytest.raises(CorruptFile, match="in whole fours"):
        restore(TWO_OF_FOUR, (8,), parts(torch.ones(1, 8), TWO_OF_FOUR))


def uneven(masks):
    """A bit of the first four goes to the second: 1 and 3 are kept, and the number stays right."""
    byte = int(masks.view(-1)[0])
    one, free = (
        next(bit for bit in range(4) if byte >> bit & 1),
        next(bit for bit in range(4, 8) if not byte >> bit & 1),
    )
    return first(masks, byte ^ (1 << one) ^ (1 << free))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("bitmask", uneven, "does not keep exactly two of every four"),
        ("compressed", lambda values: values.flatten(), "cannot be the values"),
        ("compressed", lambda values: values.reshape(values.shape[1], -1), "cannot be the values"),
        ("compressed", lambda values: values[None], "cannot be the values"),
    ],
    ids=["one and three of neighbouring fours", "flat", "turned", "one side more"],
)
def test_two_of_four_is_read_in_its_own_layout_only(sparse, tmp_path, part, change, words):
    folder = orphan(sparse, tmp_path / "old", TWO_OF_FOUR)
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"]).contiguous()
    save_file(tensors, shard)
    for use in (sparity.load, read, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(CorruptFile, match=words):
            use(folder)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", ["shape", "compressed", "bitmask", "row_offsets"])
def test_a_part_too_few_or_too_many_is_refused(sparse, tmp_path, layout, part):
    folder = orphan(sparse, tmp_path / "old", layout)
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    if tensors.pop(f"{NAME}.{part}", None) is None:
        tensors[f"{NAME}.{part}"] = torch.zeros(64, dtype=torch.int64)
    save_file(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    with pytest.raises(CorruptFile, match=f"{NAME}: {layout} needs shape, compressed"):
        CheckpointSource(folder)


@pytest.mark.parametrize("more", ["weight", "weight.x"])
def test_a_weight_that_is_there_twice_is_refused(sparse, tmp_path, more):
    folder = orphan(sparse, tmp_path / "old", BITMASK)
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    dense = torch.ones(64, 32).bfloat16()
    twice = {f"{NAME}.weight": dense} if more == "weight" else parts(dense, BITMASK)
    tensors |= twice if more == "weight" else {f"{NAME}.weight.{part}": x for part, x in twice.items()}
    save_file(tensors, shard)
    with pytest.raises(CorruptFile, match=f"{NAME}.weight is there twice"):
        CheckpointSource(folder)
