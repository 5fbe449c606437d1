"""What the study of structured pruning asks for, counts as removed, and says of who opens the result."""

import sys
from pathlib import Path

import pytest
import torch

import sparity
from sparity.static.structure.subject import Subject

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import structure_study
from structure_rows import METHODS, OF_EXPERTS, Asked, removed_by, sparsity_for

IDS = torch.randint(0, 1000, (2, 32), generator=torch.Generator().manual_seed(0))
SHAPED = (
    "magnitude, channels",
    "minitron, query heads",
    "minitron, KV groups",
    "minitron, hidden size",
    "shortgpt",
    "slicegpt, one rotation",
    "flap, blocks alike",
)


@pytest.fixture(scope="module")
def dense():
    return sparity.load("zoo:llama", dtype="float32")


@pytest.fixture(scope="module")
def mixture():
    return sparity.load("zoo:moe", dtype="float32")


def removed(model, asked, sparsity):
    smaller = sparity.restructure(model, IDS, method=asked.method, sparsity=sparsity, **asked.given(model))
    return smaller, structure_study.sizes_of(smaller, model)


@pytest.mark.parametrize("row", SHAPED)
def test_shapes_foretell_what_is_removed(dense, row):
    asked, share = METHODS[row], 0.1 if "query" in row else 0.2
    sparsity = sparsity_for(Subject(dense, None), asked, share)
    smaller, sizes = removed(dense, asked, sparsity)
    assert sizes == {"removed": pytest.approx(removed_by(Subject(dense, None), asked, sparsity), abs=1e-6), "silent": 0}
    assert abs(sizes["removed"] - share) <= 0.05
    assert structure_study.opens_in(smaller) == "transformers"


def test_blocks_that_stay_whole_are_counted(dense):
    asked = METHODS["llm_pruner"]
    sparsity = sparsity_for(Subject(dense, None), asked, 0.2)
    smaller, sizes = removed(dense, asked, sparsity)
    assert sizes["removed"] == pytest.approx(removed_by(Subject(dense, None), asked, sparsity), abs=1e-6)
    assert structure_study.opens_in(smaller) == "sparity.load"


def test_experts(mixture):
    asked = OF_EXPERTS["magnitude, experts"]
    sparsity = sparsity_for(Subject(mixture, None), asked, 0.2)
    _, sizes = removed(mixture, asked, sparsity)
    experts, attention = 8 * 3 * 192 * 128, 2 * 192 * 192 + 2 * 96 * 192
    router = 8 * 192  # it loses the rows of the experts that go
    assert sizes["removed"] == pytest.approx(0.25 * (experts + router) / (experts + attention + router))


def test_silent_attention_is_stored(dense):
    _, sizes = removed(dense, METHODS["2ssp"], 0.5)
    one = (2 * 192 * 192 + 2 * 96 * 192) / 6 / (2 * 192 * 192 + 2 * 96 * 192 + 3 * 192 * 512)
    assert sizes["silent"] / one == pytest.approx(round(sizes["silent"] / one))
    assert sizes["silent"] > 0
    assert sizes["removed"] + sizes["silent"] == pytest.approx(0.5, abs=0.01)


def test_what_is_in_memory_alone(dense):
    smaller, _ = removed(dense, METHODS["linear map, in the stream"], 0.2)
    assert structure_study.opens_in(smaller) == "in memory"


def test_a_share_that_cannot_be_met(dense):
    assert sparsity_for(Subject(dense, None), Asked("shortgpt"), 0.1) is None  # one block of six is a sixth
    assert sparsity_for(Subject(dense, None), Asked("minitron", {"dimension": "query_heads"}), 0.3) is None
