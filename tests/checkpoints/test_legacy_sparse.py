"""Orphaned layouts of compressed-tensors: read bit for bit wherever a model is read, and never half."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sparity
from families import build, tiny_configs
from orphaned_folders import TWO_OF_FOUR, orphan, parts, say
from packed_folders import logits, same
from sparity.checkpoints.source import CheckpointSource
from sparity.errors import CorruptFile, InvalidInput, SparityError, UnsupportedModel
from sparity.formats.conversions.compressed_tensors import BITMASK, PARTS, restore
from sparity.pipeline.run.packing import convert

LAYOUTS = tuple(PARTS)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A tiny Llama in bfloat16 whose projections keep two of four weights, with a bias here and there."""
    model = build(tiny_configs()["llama"]).bfloat16()
    model.config.dtype = torch.bfloat16
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                order = torch.rand(*weight.shape[:-1], weight.shape[-1] // 4, 4).argsort(-1)
                weight[(order >= 2).flatten(1)] = 0
    folder = tmp_path_factory.mktemp("sparse") / "model"
    model.save_pretrained(folder)
    return folder


def read(folder):
    source = CheckpointSource(folder)
    return source.read(list(source.shapes()))


# ---- what is read


def test_a_matrix_worked_by_hand():
    dense = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 2, 3], [0] * 9, [4, 0, 0, 0, 0, 0, 0, 0, 0]]).half()
    hand = {
        "shape": torch.tensor([3, 9]),
        "compressed": torch.tensor([1, 2, 3, 4]).half(),
        "bitmask": torch.tensor([[0b10000010, 1], [0, 0], [1, 0]], dtype=torch.uint8),
        "row_offsets": torch.tensor([0, 3, 3]),
    }
    assert torch.equal(restore(BITMASK, (3, 9), hand), dense)
    assert same(parts(dense, BITMASK), hand)
    hand = {
        "shape": torch.tensor([[1], [8]]),
        "compressed": torch.tensor([[5.0, 6.0, 0.0, 7.0]]),
        "bitmask": torch.tensor([[0b10010110]], dtype=torch.uint8),
    }
    assert restore(TWO_OF_FOUR, (1, 8), hand).tolist() == [[0, 5, 6, 0, 0, 0, 0, 7]]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(0, 99),
)  # fmt: skip
def test_any_matrix_comes_back(rows, columns, share, dtype, seed):
    drawn = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=drawn).to(getattr(torch, dtype))
    dense[torch.rand(rows, columns, generator=drawn) < share] = 0
    assert torch.equal(restore(BITMASK, (rows, columns), parts(dense, BITMASK)), dense)
    fours = dense.repeat(1, 4)
    fours.view(rows, -1, 4)[..., 1:3] = 0
    assert torch.equal(restore(TWO_OF_FOUR, fours.shape, parts(fours, TWO_OF_FOUR)), fours)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_read_bit_for_bit(sparse, tmp_path, layout, shards):
    folder = orphan(sparse, tmp_path / "old", layout, shards=shards)
    dense = load_file(sparse / "model.safetensors")
    assert same(read(folder), dense)
    assert convert(folder, tmp_path / "packed") == "packed"
    assert convert(folder, tmp_path / "plain", to="plain") == "plain"
    for converted in ("packed", "plain"):
        assert same(read(tmp_path / converted), dense)
        config = json.loads((tmp_path / converted / "config.json").read_text())
        assert config.get("quantization_config", {}).get("quant_method") in ("sparity", None)
    expected = logits(sparity.load(sparse))
    assert torch.equal(logits(sparity.load(tmp_path / "plain")), expected)
    assert torch.equal(logits(sparity.load(folder)), expected)
    assert sparity.load(folder).dtype == torch.bfloat16


def test_a_folder_from_before_0_9_in_which_every_tensor_is_compressed(sparse, tmp_path):
    dense = load_file(sparse / "model.safetensors")
    folder = orphan(sparse, tmp_path / "old", BITMASK, names=set(dense), early=True)
    assert "model.norm.weight.bitmask" in load_file(folder / "model-00001-of-00001.safetensors")
    assert same(read(folder), dense)
    convert(folder, tmp_path / "packed")
    assert same(read(tmp_path / "packed"), dense)
    assert "compression_config" not in json.loads((tmp_path / "packed" / "config.json").read_text())


def test_it_can_be_pruned_further_and_measured(sparse, tmp_path, token_files):
    folder = orphan(sparse, tmp_path / "old", TWO_OF_FOUR)
    recipe = {
        "calibration": {"tokens": token_files["calibration"]},
        "stages": [{"prune": {"score": "magnitude", "sparsity": 0.75}}],
        "measure": {"speed": None},
    }
    done = sparity.run(recipe, model=str(folder), output=tmp_path / "out", device="cpu")
    assert done.report.candidates[0].sparsity == pytest.approx(0.75, abs=0.02)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_weights_that_are_only_said_to_be_sparse_are_plain(sparse, tmp_path):
    folder = orphan(sparse, tmp_path / "old", BITMASK, names=())
    say(folder, format="dense")
    assert same(read(folder), load_file(sparse / "model.safetensors"))
    assert torch.equal(logits(sparity.load(folder)), logits(sparity.load(sparse)))


def test_the_fingerprint_sees_every_shard(sparse, tmp_path):
    folder = orphan(sparse, tmp_path / "old", BITMASK, shards=30)
    before = CheckpointSource(folder).fingerprint()
    lonely = next(p for p in sorted(folder.glob("model-*")) if all("bitmask" in n for n in load_file(p)))
    save_file({name: x ^ 1 for name, x in load_file(lonely).items()}, lonely)
    assert CheckpointSource(folder).fingerprint() != before


# ---- what is refused


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
