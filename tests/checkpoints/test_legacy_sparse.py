"""Orphaned layouts of compressed-tensors: read bit for bit wherever a model is read, and never half."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sparity
from orphaned_folders import TWO_OF_FOUR, orphan, parts, read, say
from packed_folders import logits, same
from sparity.checkpoints.source import CheckpointSource
from sparity.formats.conversions.compressed_tensors import BITMASK, PARTS, restore
from sparity.pipeline.run.packing import convert

LAYOUTS = tuple(PARTS)


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
