import math

import pytest
import torch

import sparity
from sparity.budgets.base import Site, shift_to_sparsity
from sparity.budgets.linear_depth import LinearDepth
from sparity.budgets.log_depth import LogDepth
from sparity.budgets.owl import OWL
from sparity.calibration import Statistics
from sparity.errors import InvalidInput


def sites(costs, evidence=None):
    return [Site(f"s{i}", float(cost), i, evidence[i] if evidence else 0.0) for i, cost in enumerate(costs)]


def test_linear_depth_by_hand():
    assert LinearDepth(0.3, 0.7).allocate(sites([1, 1, 1]), 0.5) == pytest.approx({"s0": 0.3, "s1": 0.5, "s2": 0.7})
    assert LinearDepth(0.3, 0.7).allocate(sites([1, 1, 1]), 0.6) == pytest.approx({"s0": 0.4, "s1": 0.6, "s2": 0.8})
    assert LinearDepth(0.7, 0.3).allocate(sites([1, 1]), 0.5) == pytest.approx({"s0": 0.7, "s1": 0.3})


def test_log_depth_is_the_plans_formula_shifted():
    """r_i = r_0 + (r_last - r_0) log(i + 1) / log(n): 0, 0.5 and 1 for the blocks 0, 1 and 3 of four."""
    four = LogDepth(0.2, 0.6).allocate(sites([1, 1, 1, 1]), 0.5)
    rises = [0, 0.5, math.log(3) / math.log(4), 1]
    shift = 0.5 - sum(0.4 * rise for rise in rises) / 4
    assert list(four.values()) == pytest.approx([shift + 0.4 * rise for rise in rises])


def test_one_block_gets_the_target():
    for law in (LinearDepth, LogDepth):
        assert law().allocate([Site("a", 1.0), Site("b", 3.0)], 0.4) == pytest.approx({"a": 0.4, "b": 0.4})


def test_shares_are_clipped_and_the_mean_still_met():
    shares = LinearDepth(0.0, 0.9).allocate(sites([1, 1, 1, 5]), 0.9)
    assert shares["s3"] == 0.999
    assert sum(shares[f"s{i}"] * cost for i, cost in enumerate([1, 1, 1, 5])) / 8 == pytest.approx(0.9, abs=1e-9)
    assert shift_to_sparsity(sites([1, 1]), [0.0, 0.5], 0.0) == {"s0": 0.0, "s1": 0.0}


def reference_owl(ratios, sparsity, shift):
    """OWL's code: keep = r - mean(r) + (1 - s), with r the ratios stretched to [0, 2 lambda]."""
    stretched = [(r - min(ratios)) * (1 / (max(ratios) - min(ratios)) * shift * 2) for r in ratios]
    mean = sum(stretched) / len(stretched)
    return [1 - (r - mean + (1 - sparsity)) for r in stretched]


def test_owl_has_the_ratios_of_the_reference():
    ratios = [3.0, 1.0, 0.5, 2.25]
    shares = OWL(max_shift=0.08).allocate(sites([1, 1, 1, 1], ratios), 0.7)
    assert list(shares.values()) == pytest.approx(reference_owl(ratios, 0.7, 0.08))
    assert max(shares.values()) - min(shares.values()) == pytest.approx(0.16)


def test_owl_counts_outliers_over_a_block_or_by_layer():
    """|w| * norm is 1 seven times and 9 once in a (mean 2), 1 eight times in b: over both the mean is 1.5."""
    weights = {"a": torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -3]]), "b": torch.full((2, 4), 0.5)}
    inputs = {"a": torch.tensor([[1.0, 1, 1, 3]]), "b": torch.full((1, 4), 2.0)}  # one token: its size is its norm
    statistics = {name: Statistics.gather(name, OWL.needs) for name in inputs}
    for name, token in inputs.items():
        statistics[name].add(token)
    weights["a"][0, 3] = 1 / 3
    block = OWL(outlier_multiple=5).observe(weights, statistics)
    assert block == {"a": 100 / 16, "b": 100 / 16}  # 9 > 7.5
    layer = OWL(outlier_multiple=4, per="layer").observe(weights, statistics)
    assert layer == {"a": 12.5, "b": 0.0}  # 9 > 8
    assert OWL(outlier_multiple=5, per="layer").observe(weights, statistics)["a"] == 0.0  # 9 < 10


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_owl_in_a_run(family_models, token_files, tmp_path, score):
    recipe = {
        "calibration": {"tokens": token_files["calibration"]},
        "stages": [{"prune": {"score": score, "budget": {"owl": {"outlier_multiple": 3.0}}, "sparsity": 0.6}}],
        "measure": {"speed": None},
    }
    result = sparity.run(recipe, model=family_models["llama"], output=tmp_path / "out")
    layers = result.report.candidates[0].changes
    by_block = [{layer.target for layer in layers if layer.block == block} for block in range(3)]
    assert [len(targets) for targets in by_block] == [1, 1, 1]
    shares = [targets.pop() for targets in by_block]
    assert max(shares) - min(shares) == pytest.approx(0.16)
    assert sum(shares) / 3 == pytest.approx(0.6)
    assert result.report.candidates[0].sparsity == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("budget", ["owl", {"owl": {"per": "layer"}}, "log_depth", "linear_depth"])
def test_n_of_m_cannot_follow_a_budget(family_models, token_files, budget):
    recipe = {
        "calibration": {"tokens": token_files["calibration"]},
        "stages": [{"prune": {"pattern": "2:4", "budget": budget}}],
    }
    with pytest.raises(InvalidInput, match="2 of 4 kept removes 50% everywhere and cannot follow the budget"):
        sparity.run(recipe, model=family_models["llama"])


def test_bad_options(family_models):
    for budget, words in (
        ({"owl": {"outlier_multiple": 0}}, "must be positive"),
        ({"owl": {"per": "row"}}, "'block' or 'layer'"),
        ({"log_depth": {"last": 1.0}}, "must lie in"),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.run({"stages": [{"prune": {"score": "magnitude", "budget": budget}}]}, model=family_models["llama"])
    with pytest.raises(InvalidInput, match=r"prune \(.*\) needs calibration text for column_norm"):
        sparity.run({"stages": [{"prune": {"score": "magnitude", "budget": "owl"}}]}, model=family_models["llama"])
