"""Block greedy: its path by hand, its steps for matrices of unequal size, and what holds for every loss."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives import Objective

from sparity import registry
from sparity.budgets.base import Site
from sparity.errors import InvalidInput


def build(**options):
    return registry.build("budget", {"block_greedy": options})


def path_of(sites, sparsity, loss, **options):
    """What was allocated, and each allocation whose error was asked for, in turn."""
    seen = []

    def noted(shares):
        seen.append({name: round(share, 9) for name, share in shares.items()})
        return loss(shares)

    return build(**options).allocate(sites, sparsity, Objective(noted)), seen


def test_the_path_by_hand():
    """Half of 4 + 1 weights, in steps of 1: a loses 2 x^2, b loses x^2 / 2 (x of its own weights).

    From (0, 0): a at 1/4 costs 1/8, b at 1 (cut at 0.999) costs 1/2: a. From (1/4, 0): a at 1/2 is 1/2, b makes it
    1/8 + 1/2: a. The half step that is left: a at 5/8 is 25/32, b at 1/2 makes it 1/2 + 1/8: b. Uniform: 1/2 + 1/8 too.
    """
    sites = [Site("a", 4.0), Site("b", 1.0)]

    def loss(shares):
        return 2 * shares["a"] ** 2 + 0.5 * shares["b"] ** 2

    found, seen = path_of(sites, 0.5, loss, step=0.2)
    assert found == {"a": 0.5, "b": 0.5}
    assert seen == [
        {"a": 0.25, "b": 0.0},
        {"a": 0.0, "b": 0.999},
        {"a": 0.5, "b": 0.0},
        {"a": 0.25, "b": 0.999},
        {"a": 0.625, "b": 0.0},
        {"a": 0.5, "b": 0.5},
        {"a": 0.5, "b": 0.5},
        {"a": 0.5, "b": 0.5},
    ]


def test_what_costs_nothing_goes_first_and_the_target_is_met_by_a_last_short_step():
    sites = [Site("free", 1.0), Site("dear", 3.0)]
    found, _ = path_of(sites, 0.4, lambda shares: shares["dear"], step=0.1)
    assert found["free"] == 0.999  # the third step is cut there
    assert found["dear"] == pytest.approx((0.4 * 4 - 0.999) / 3, abs=1e-12)


def test_a_quarter_of_the_weights_rises_in_steps_four_times_as_large():
    """q and k of grouped heads: a step takes as many weights of either."""
    sites = [Site("q", 4.0), Site("k", 1.0)]
    _, seen = path_of(sites, 0.1, lambda shares: sum(shares.values()), step=0.04)
    assert seen[:2] == [{"q": 0.05, "k": 0.0}, {"q": 0.0, "k": 0.2}]


def test_every_block_gets_the_target_and_is_measured_with_its_own_inputs():
    sites = [Site(f"{block}.{name}", cost, block) for block in (2, 5) for name, cost in (("q", 1.0), ("up", 3.0))]
    asked = []

    class Blocks(Objective):
        def block_error(self, block, allocation, error="token"):
            asked.append((block, error, {name[0] for name in allocation}))
            return super().block_error(block, allocation, error)

    def loss(shares):
        return sum((10 if name == "2.q" or name == "5.up" else 1) * share**2 for name, share in shares.items())

    found = build(step=0.01, reference=True).allocate(sites, 0.3, Blocks(loss))
    assert {(block, error) for block, error, _ in asked} == {(2, "teal"), (5, "teal")}
    assert all(names == {str(block)} for block, _, names in asked)
    for block in "25":
        assert found[f"{block}.q"] + 3 * found[f"{block}.up"] == pytest.approx(1.2, abs=1e-12)
    assert found["2.q"] < 0.3 < found["5.q"]


MATRIX = st.tuples(st.integers(0, 2), st.integers(1, 100), st.floats(0, 5), st.floats(0, 5))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(MATRIX, min_size=1, max_size=8),
    sparsity=st.floats(0, 0.99),
    step=st.sampled_from([0.01, 0.07, 0.3, 1.0]),
)
def test_the_target_is_met_and_no_block_is_worse_than_uniform(sizes, sparsity, step):
    sites = [Site(str(i), float(size), block) for i, (block, size, _, _) in enumerate(sizes)]
    inside = {block: {site.name for site in sites if site.depth == block} for block in range(3)}

    def loss(shares):
        hurts = {str(i): (a, b) for i, (_, _, a, b) in enumerate(sizes)}
        return sum(hurts[name][0] * share + hurts[name][1] * share**3 for name, share in shares.items())

    objective = Objective(loss, lambda block: inside[block])
    found = build(step=step).allocate(sites, sparsity, objective)
    assert found == build(step=step).allocate(sites, sparsity, objective)
    for block, names in inside.items():
        mine = [site for site in sites if site.name in names]
        if mine:
            total = sum(site.cost for site in mine)
            assert sum(site.cost * found[site.name] for site in mine) / total == pytest.approx(sparsity, abs=1e-9)
            assert objective.block_error(block, found) <= objective.block_error(block, dict.fromkeys(found, sparsity))


def test_what_it_refuses():
    for options, words in (({"step": 0.0}, r"must lie in \(0, 1\]"), ({"samples": 0}, "on at least 1 sequence")):
        with pytest.raises(InvalidInput, match=words):
            build(**options)
    with pytest.raises(InvalidInput, match="it needs an objective"):
        build().allocate([Site("a", 1.0), Site("b", 1.0)], 0.5)
