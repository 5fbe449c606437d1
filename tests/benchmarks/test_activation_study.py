"""What the study of activations counts as skipped."""

import sys
from pathlib import Path

import pytest
import torch

import sparity
from sparity.quality.perplexity import window_logits

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import activation_study

IDS = torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return sparity.load("zoo:llama", dtype="bfloat16")


def counted(model, sites, among=None, **asked):
    with (
        sparity.with_activations(model, IDS, sites=sites, **asked) as sparse,
        activation_study.skipped_share(sparse, among or sites) as share,
    ):
        window_logits(sparse, IDS[0])
    return list(share)


@pytest.mark.parametrize(("method", "sites"), [("teal", "all"), ("cats", "gate_output")])
def test_of_all_weights_that_a_token_may_skip(model, method, sites):
    assert sum(counted(model, sites, method=method, sparsity=0.5)) == pytest.approx(0.5, abs=0.03)


def test_places_without_a_threshold_count_as_read(model):
    share = counted(model, "hidden", among="all", method="teal", sparsity=0.5)
    mlp, block = model.model.layers[0].mlp, model.model.layers[0]
    weights = sum(module.weight.numel() for module in block.modules() if isinstance(module, torch.nn.Linear))
    assert len(share) == len(model.model.layers)
    assert sum(share) == pytest.approx(0.5 * mlp.down_proj.weight.numel() / weights, abs=0.01)


def test_what_is_more_than_a_rule_is_not_counted(model):
    assert counted(model, "all", method="larosa", sparsity=0.5) == []
