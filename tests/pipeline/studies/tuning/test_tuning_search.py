"""The search: the best within a limit, by tables of losses that add up, or do not."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity.errors import InvalidInput
from sparity.formats import build_encoding
from sparity.pipeline.studies.tuning.costs import Price, Whole
from sparity.pipeline.studies.tuning.limits import Limits
from sparity.pipeline.studies.tuning.losses import worthwhile
from sparity.pipeline.studies.tuning.menu import Choice, Menu
from sparity.pipeline.studies.tuning.pairs import interaction
from sparity.pipeline.studies.tuning.search import Table, best, front
from sparity.pipeline.studies.tuning.units import Unit
from sparity.stages.trials import Trial

UNITS = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 400)), min_size=1, max_size=3), min_size=1, max_size=4
)


def table(units):
    """Each unit may stay as it is, for 100 and without loss."""
    costs = tuple((100.0, *(float(cost) for cost, _ in unit)) for unit in units)
    losses = tuple((0.0, *(loss / 1000 for _, loss in unit)) for unit in units)
    return Table(tuple(tuple(map(str, range(len(unit)))) for unit in costs), costs, losses, {})


@settings(max_examples=20, deadline=None)
@given(UNITS, st.integers(0, 1500))
def test_the_cheapest_within_a_bound(units, most):
    known = table(units)
    picks = known.solve(most / 1000)
    every = itertools.product(*(range(len(costs)) for costs in known.costs))
    allowed = [known.cost(each) for each in every if known.loss(each) <= most / 1000 + 1e-9]
    assert known.loss(picks) <= most / 1000 * (1 + 1e-5) + 1e-9
    assert known.cost(picks) == pytest.approx(min(allowed))


@settings(max_examples=8, deadline=None)
@given(UNITS, st.floats(0.05, 1.0), st.floats(0.3, 3.0))
def test_the_front_finds_the_limit_whatever_the_ratio_of_sum_and_loss(units, limit, ratio):
    """Losses together are `ratio` times their sum: the front must correct for it, by what it measures."""
    known, asked = table(units), []

    def measure(picks):
        asked.append(tuple(picks))
        return Trial(known.loss(picks) * ratio, 1.0)

    points = front(known, measure, lambda trial: trial.kl / limit)
    assert len(set(asked)) == len(asked) == len(points)
    assert [point.predicted for point in points] == sorted(point.predicted for point in points)
    found = best(points)
    assert found.excess <= 1
    assert found.cost == min(point.cost for point in points if point.measured.kl <= limit)
    costs = [known.cost(point.picks) for point in points]
    assert costs == sorted(costs, reverse=True)
    cheapest = known.solve(limit / ratio)
    assert found.cost >= known.cost(cheapest) - 1e-9


def test_pairs_change_what_is_chosen():
    costs, losses = ((10.0, 1.0),) * 3, ((0.0, 0.4),) * 3
    names = (("dense", "less"),) * 3
    alone = Table(names, costs, losses, {})
    assert sum(alone.solve(0.8)) == 2
    harmful = {(0, 1): np.array([[0.0, 0.0], [0.0, 0.3]])}
    assert Table(names, costs, losses, harmful).solve(0.8) in ([1, 0, 1], [0, 1, 1])
    helpful = {(0, 1): np.array([[0.0, 0.0], [0.0, -0.4]])}
    found = Table(names, costs, losses, helpful)
    assert found.solve(0.8) == [1, 1, 1]
    assert found.loss([1, 1, 1]) == pytest.approx(0.8)


def test_the_cosine_of_two_errors():
    assert interaction(2.0, 1.0, 1.0) == 0
    assert interaction(4.0, 1.0, 1.0) == 1  # the same error twice: (1 + 1)^2
    assert interaction(0.0, 1.0, 1.0) == -1
    assert interaction(13.0, 4.0, 9.0) == 0
    assert interaction(5.0, 0.0, 1.0) == 0
    assert interaction(9.0, 1.0, 1.0) == 1  # no cosine is more


def choice(weights="dense", values="same", inputs="all"):
    name = ", ".join(
        label for label, first in ((weights, "dense"), (values, "same"), (inputs, "all")) if label != first
    )
    return Choice((weights, values, inputs), ((), (), ()), build_encoding("same"), name or "dense")


def test_a_choice_that_a_gentler_one_undercuts_is_not_measured():
    unit = Unit("u", 0, "o", ("p",), ((4, 4),), 1.0, (("p",),))
    nothing, int8, half, both = choice(), choice(values="int8"), choice("50 %"), choice("50 %", "int8")
    costs = {nothing: 10.0, int8: 6.0, half: 11.0, both: 6.0}
    prices = {("u", each.name): Price(cost, "dense") for each, cost in costs.items()}
    assert worthwhile([unit], list(costs), prices) == {"u": [nothing, int8]}
    prices["u", both.name] = Price(5.0, "bitmask")
    assert worthwhile([unit], list(costs), prices) == {"u": [nothing, int8, both]}
    del prices["u", int8.name]  # no kernel takes it
    assert worthwhile([unit], list(costs), prices) == {"u": [nothing, both]}


def test_a_gain_counts_what_no_choice_changes():
    assert Whole(10.0, 4.0).gain(6.0) == 1
    assert Whole(10.0, 4.0).gain(1.0) == 2


def test_limits():
    limits = Limits.of("+5%", 0.2, "1.5x")
    assert (limits.perplexity, limits.kl, limits.least) == (0.05, 0.2, 1.5)
    assert limits.words == "perplexity +5 % and KL 0.2"
    assert limits.accept == {"perplexity": "+5%", "kl": 0.2}
    assert limits.excess(0.025, 0.1) == pytest.approx(0.5)
    assert limits.excess(0.05, 0.3) == pytest.approx(1.5)
    assert limits.excess(-0.1, 0.0) == 0
    assert Limits.of("0%", None, None).excess(0.01, 9.0) == float("inf")
    assert Limits.of("0%", None, None).excess(-0.01, 9.0) == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((None, None, None), "a limit is missing"),
        (("5", None, None), r'write it as "\+5%"'),
        ((None, -1.0, None), "0 or more"),
        ((None, float("nan"), None), "0 or more"),
        (("+5%", None, "fast"), 'write it as "1.5x"'),
    ],
)
def test_limits_that_are_none(given, words):
    with pytest.raises(InvalidInput, match=words):
        Limits.of(*given)


@pytest.mark.parametrize(
    ("menu", "words"),
    [
        ({"weights": {"dense": []}}, "values: Field required"),
        ({"weights": {"dense": []}, "values": {"int8": {"encoding": "int8"}}}, "must leave everything as it is"),
        ({"weights": {"half": [{"prune": {}}]}, "values": {"same": {"encoding": "same"}}}, "must leave everything"),
        ({"weights": {"dense": []}, "values": {"same": {"encoding": "same"}}, "heads": {}}, "heads: Extra inputs"),
        ({"weights": {"dense": [{"prun": {}}]}, "values": {"same": {"encoding": "same"}}}, 'no stage "prun"'),
    ],
)
def test_menus_that_are_none(menu, words):
    with pytest.raises(InvalidInput, match=words):
        Menu.read(menu)
