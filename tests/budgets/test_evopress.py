"""EvoPress: the optimum where all choices can be tried, how its rounds select, and what holds for every loss."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import Objective

from sparity import registry
from sparity.budgets.base import Site
from sparity.errors import InvalidInput, NumericalError


def build(**options):
    return registry.build("budget", {"evopress": options})


def best_of_all(costs, weights, loss, sparsity=0.5, spread=0.3):
    """The least loss of all levels that keep the budget."""
    most = [int(spread * cost / weights + 1e-9) for cost in costs]
    ranges = [range(-levels, levels + 1) for levels in most]
    legal = [levels for levels in itertools.product(*ranges) if sum(levels) == 0]
    return min(loss({str(i): sparsity + n * weights / costs[i] for i, n in enumerate(levels)}) for levels in legal)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 4.0]), st.floats(0.1, 10)), min_size=2, max_size=3))
def test_it_finds_the_best_of_all_choices_where_losses_are_convex(found):
    """Then an allocation that no single exchange improves is the best of all."""
    costs = [cost for cost, _ in found]

    def loss(shares):
        return sum(each * costs[int(name)] * shares[name] ** 2 for name, (_, each) in zip(shares, found, strict=True))

    sites = [Site(str(i), cost, i) for i, cost in enumerate(costs)]
    weights = min(0.1 * sum(costs) / len(costs), 0.3 * min(costs))
    shares = build(step=0.1, generations=60, survivors=1).allocate(sites, 0.5, Objective(loss))
    assert loss(shares) == pytest.approx(best_of_all(costs, weights, loss), rel=1e-9)


def test_exchanges_leave_a_place_that_no_single_one_improves():
    """Three levels at once are needed here, and one draw in nine makes three exchanges."""

    def loss(shares):
        return 0.0 if shares["a"] > 0.79 else 1.0 if shares["a"] == 0.5 else 2.0

    sites = [Site("a", 1.0), Site("b", 1.0, 1)]
    shares = build(step=0.1, generations=10).allocate(sites, 0.5, Objective(loss))
    assert shares == pytest.approx({"a": 0.8, "b": 0.2})


def test_a_level_is_as_many_weights_everywhere():
    """Steps of 0.1 of the mean size 2.5 are a quarter of the small one's weights and 1/16 of the large one's."""
    sites = [Site("small", 1.0), Site("large", 4.0, 1)]
    shares = build(step=0.1).allocate(sites, 0.5, Objective(lambda shares: shares["large"]))
    assert shares == pytest.approx({"small": 0.75, "large": 0.4375})  # one more would leave the spread of 0.3


def test_rounds_measure_more_and_keep_fewer():
    objective = Objective(lambda shares: shares["0"] + 2 * shares["1"] ** 2)
    sites = [Site(str(i), 1.0, i) for i in range(8)]
    build(samples=32, offspring=12, survivors=4, generations=1).allocate(sites, 0.5, Objective(lambda shares: 1.0))
    build(samples=32, offspring=12, survivors=4, generations=1).allocate(sites, 0.5, objective)
    assert objective.asked == [None, *[2] * 12, *[8] * 4, *[None] * 2]


def test_the_parent_stays_unless_a_child_is_better_and_the_loss_never_rises():
    seen = []

    def loss(shares):
        value = sum((1 + int(name)) * share**2 for name, share in shares.items())
        seen.append((value, dict(shares)))
        return value

    sites = [Site(str(i), 1.0, i) for i in range(5)]
    flat = build().allocate(sites, 0.5, Objective(lambda shares: 1.0))
    assert flat == dict.fromkeys(map(str, range(5)), 0.5)
    shares = build(generations=5).allocate(sites, 0.5, Objective(loss))
    assert loss(shares) <= seen[0][0]
    assert seen[0][1] == flat


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=8),
    sparsity=st.floats(0, 0.99),
    per=st.sampled_from(["block", "layer"]),
    seed=st.integers(0, 5),
)
def test_the_target_is_met_never_worse_than_uniform_and_the_same_each_time(sizes, sparsity, per, seed):
    sites = [Site(str(i), float(size), i // 2) for i, (size, _, _) in enumerate(sizes)]

    def loss(shares):
        return sum(a * shares[str(i)] + b * abs(shares[str(i)] - 0.4) for i, (_, a, b) in enumerate(sizes))

    budget = build(generations=4, per=per, seed=seed)
    shares = budget.allocate(sites, sparsity, Objective(loss))
    total = sum(site.cost for site in sites)
    assert sum(site.cost * shares[site.name] for site in sites) / total == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= share < 1 and abs(share - sparsity) <= 0.3 + 1e-9 for share in shares.values())
    assert loss(shares) <= loss(dict.fromkeys(shares, sparsity))
    assert shares == budget.allocate(sites, sparsity, Objective(loss))
    if per == "block":
        assert all(shares[str(i)] == shares[str(i - i % 2)] for i in range(len(sizes)))


def test_what_it_refuses():
    for options, words in (
        ({"generations": 0}, "must be 1 or more"),
        ({"survivors": 17}, "survivors 17 from 1 to offspring"),
        ({"step": 0.4}, "must fit 0 < step <= spread <= 1"),
        ({"samples": 0}, "on at least 1 sequence"),
    ):
        with pytest.raises(InvalidInput, match=words):
            build(**options)
    sites = [Site("a", 1.0), Site("b", 1.0, 1)]
    with pytest.raises(InvalidInput, match="it needs an objective"):
        build().allocate(sites, 0.5)
    with pytest.raises(NumericalError, match="a measured loss is NaN"):
        build().allocate(sites, 0.5, Objective(lambda shares: float("nan")))
