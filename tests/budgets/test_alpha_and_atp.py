"""AlphaPruning and ATP: their formulas written plainly, by hand, and in a run."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives import Objective

import sparity
from sparity import registry
from sparity.budgets.alpha_pruning import LIGHTEST, tail_exponent
from sparity.budgets.base import MOST, Site, scale_to_sparsity
from sparity.errors import InvalidInput


def diagonal(*singular):
    return torch.diag(torch.tensor(singular, dtype=torch.float32))


def hill(values, start):
    """1 + n / (sum of logs - n * log of the least), of squared singular values in ascending order."""
    tail = values[start:]
    return 1 + len(tail) / (sum(map(math.log, tail)) - len(tail) * math.log(tail[0]))


def test_alpha_from_the_middle_by_hand():
    weight = diagonal(1.0, 2.0, 3.0, 4.0)
    assert tail_exponent(weight, "middle") == pytest.approx(1 + 2 / math.log(16 / 9))
    assert tail_exponent(torch.cat([weight, torch.zeros(3, 4)]), "middle") == pytest.approx(1 + 2 / math.log(16 / 9))


def test_the_peak_is_where_the_power_law_fits_best_near_the_histograms_highest_bin():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 60, generator=generator)
    values = (torch.linalg.svdvals(weight.double()) ** 2).sort().values.tolist()
    logs = [math.log10(value) for value in values]
    width = (logs[-1] - logs[0]) / 100
    counts = [0] * 100
    for each in logs:
        counts[min(int((each - logs[0]) / width), 99)] += 1
    peak = 10 ** (logs[0] + width * counts.index(max(counts)))
    distances = {}
    for start in range(len(values) - 1):
        if 0.95 * peak <= values[start] <= 1.5 * peak:
            tail, alpha = values[start:], hill(values, start)
            distances[start] = max(
                abs(1 - (value / tail[0]) ** (1 - alpha) - place / len(tail)) for place, value in enumerate(tail)
            )
    assert tail_exponent(weight, "peak") == pytest.approx(hill(values, min(distances, key=distances.get)), rel=1e-5)


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.ones(3, 4), torch.eye(4)], ids=["zero", "rank 1", "equal"])
@pytest.mark.parametrize("tail", ["middle", "peak"])
def test_a_spectrum_without_a_tail(weight, tail):
    assert tail_exponent(weight, tail) == LIGHTEST


def test_sparsities_are_proportional_to_stretched_alphas():
    """Alphas 2, 3, 4 of sizes 1, 1, 2: 0.7, 1, 1.3 times 0.5 * 4 / 4.3."""
    sites = [Site("a", 1.0, 0, 2.0), Site("b", 1.0, 1, 3.0), Site("c", 2.0, 2, 4.0)]
    found = registry.build("budget", {"alpha_pruning": {"epsilon": 0.3}}).allocate(sites, 0.5)
    assert found == pytest.approx({name: shape * 2 / 4.3 for name, shape in zip("abc", (0.7, 1.0, 1.3), strict=True)})


def test_blocks_share_the_mean_of_their_alphas():
    weights = {"q": diagonal(1.0, 2.0, 3.0, 4.0), "k": diagonal(1.0, 1.5, 2.0, 9.0)}
    each = registry.build("budget", {"alpha_pruning": {"per": "layer"}}).observe(weights, {})
    together = registry.build("budget", {"alpha_pruning": {}}).observe(weights, {})
    assert each == {name: tail_exponent(weight, "peak") for name, weight in weights.items()}
    assert set(together.values()) == {sum(each.values()) / 2}


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 2)), min_size=1, max_size=6), st.floats(0, 0.998))
def test_scaled_sparsities_have_the_mean_and_the_limit(found, sparsity):
    sites = [Site(str(i), float(size)) for i, (size, _) in enumerate(found)]
    shape = [value for _, value in found]
    scaled = list(scale_to_sparsity(sites, shape, sparsity).values())
    mean = sum(site.cost * each for site, each in zip(sites, scaled, strict=True)) / sum(site.cost for site in sites)
    assert mean == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= each <= MOST for each in scaled)
    free = [each / value for each, value in zip(scaled, shape, strict=True) if each < MOST]
    assert max(free, default=0) == pytest.approx(min(free, default=0), abs=1e-9)


def test_atp_tries_steps_and_takes_the_best():
    """Losses are least where the last of three blocks gives up 0.3 more than the first."""
    sites = [Site(str(i), 1.0, i) for i in range(3)]
    asked = Objective(lambda shares: abs(shares["2"] - shares["0"] - 0.3))
    found = registry.build("budget", {"atp": {"tries": 11, "samples": 5}}).allocate(sites, 0.7, asked)
    assert found == pytest.approx(
        {"0": 0.55, "1": 0.7, "2": 0.85}, abs=2e-3
    )  # steps of 0.0299 for the last block's limit
    assert set(asked.asked) <= {5, None}
    uphill = Objective(lambda shares: shares["2"])
    assert set(registry.build("budget", "atp").allocate(sites, 0.7, uphill).values()) == {0.7}


@pytest.mark.parametrize("budget", ["alpha_pruning", {"atp": {"tries": 3, "samples": 1}}], ids=["alpha", "atp"])
def test_in_a_run(family_models, token_files, budget):
    recipe = {
        "calibration": {"tokens": token_files["calibration"], "batch": 3},
        "stages": [{"prune": {"score": "magnitude", "budget": budget, "sparsity": 0.6}}],
        "measure": {"perplexity": [token_files["text"]], "window": 32, "windows": 1, "speed": None},
    }
    result = sparity.run(recipe, model=family_models["llama"], device="cpu")
    candidate = result.report.candidates[0]
    assert candidate.totals.zeros == pytest.approx(0.6, abs=2e-3)
    by_block = {change.block: change.target for change in candidate.changes}
    if budget == "alpha_pruning":
        assert len(set(by_block.values())) == len(by_block)


def test_alphas_need_no_text(family_models):
    stages = [{"prune": {"score": "magnitude", "budget": "alpha_pruning", "sparsity": 0.5}}]
    found = sparity.run({"stages": stages, "measure": {"speed": None}}, model=family_models["llama"], device="cpu")
    assert found.report.candidates[0].totals.zeros == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"alpha_pruning": {"epsilon": 1.0}}, r"must lie in \[0, 1\)"),
        ({"alpha_pruning": {"tail": "top"}}, "'peak' or 'middle'"),
        ({"atp": {"tries": 1}}, "must be 2 or more"),
        ({"atp": {"samples": 0}}, "must be 2 or more, and samples 0 1 or more"),
    ],
)
def test_what_they_refuse(budget, words):
    with pytest.raises(InvalidInput, match=words):
        registry.build("budget", budget)
