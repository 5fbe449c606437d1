"""The search among shapes: against every combination tried in the plainest way, by hand-made tables of prices."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity.errors import InvalidInput
from sparity.pipeline.studies.shapes.axes import Axis
from sparity.pipeline.studies.shapes.search import best, candidates, closest, front

GOALS = ("decode", "bytes")


def axis(name, *losses):
    """Sizes 1 to as many as there are losses."""
    return Axis(name, len(losses), tuple(range(1, len(losses) + 1)), losses)


def table(axes, costs, legal=lambda sizes: True):
    """Candidates whose costs stand in a list in the order of all combinations."""
    order = list(itertools.product(*(each.sizes for each in axes)))
    by_sizes = dict(zip(order, costs, strict=True))

    def price(sizes):
        seconds, size = by_sizes[tuple(sizes.values())]
        return {"decode": float(seconds), "bytes": float(size)}

    return candidates(axes, legal, price)


LOSSES = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@st.composite
def tables(draw):
    axes = [axis(name, *(loss / 4 for loss in draw(LOSSES))) for name in "abc"[: draw(st.integers(1, 3))]]
    count = len(list(itertools.product(*(each.sizes for each in axes))))
    cost = st.tuples(st.integers(1, 5), st.integers(1, 5))
    return table(axes, draw(st.lists(cost, min_size=count, max_size=count)))


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 5)))
def test_the_best_loses_least_of_all_within_the_limits(found, seconds, size):
    most = {"decode": float(seconds), **({} if size is None else {"bytes": float(size)})}
    able = [one for one in found if one.costs["decode"] <= seconds and (size is None or one.costs["bytes"] <= size)]
    chosen = best(found, most)
    if not able:
        assert chosen is None
        near = closest(found, most)
        assert near.excess(most) == min(one.excess(most) for one in found) > 1
        return
    assert chosen in able
    assert chosen.loss == min(one.loss for one in able)
    equal = [one for one in able if one.loss == chosen.loss]
    assert chosen.costs["decode"] == min(one.costs["decode"] for one in equal)
    assert best(found[::-1], most) == chosen


@settings(max_examples=60, deadline=None)
@given(tables(), st.sampled_from([GOALS, GOALS[:1], GOALS[1:]]))
def test_the_front_has_every_shape_that_no_other_beats_and_no_other(found, goals):
    def values(one):
        return (one.loss, *(one.costs[goal] for goal in goals))

    def beats(one, other):
        return values(one) != values(other) and all(a <= b for a, b in zip(values(one), values(other), strict=True))

    kept = front(found, goals)
    unbeaten = {values(one) for one in found if not any(beats(other, one) for other in found)}
    assert [values(one) for one in kept] == sorted(unbeaten)
    assert front(found[::-1], goals) == kept


@settings(max_examples=40, deadline=None)
@given(tables(), st.integers(1, 5))
def test_the_best_lies_on_the_front(found, seconds):
    chosen = best(found, {"decode": float(seconds)})
    on_front = [(one.loss, one.costs["decode"]) for one in front(found, ["decode"])]
    assert chosen is None or (chosen.loss, chosen.costs["decode"]) in on_front


def test_ties_go_to_what_costs_less_then_to_larger_first_axes():
    axes = [axis("a", 0.5, 0.0), axis("b", 0.5, 0.0)]
    #          1, 1     1, 2     2, 1     2, 2
    same = [(1, 1), (2, 2), (2, 2), (4, 4)]
    assert best(table(axes, same), {"decode": 3.0}).sizes == {"a": 2, "b": 1}
    fewer_bytes = [(1, 1), (2, 1), (2, 2), (4, 4)]
    assert best(table(axes, fewer_bytes), {"decode": 3.0}).sizes == {"a": 1, "b": 2}
    assert [one.sizes for one in front(table(axes, same), ["decode"])] == [
        {"a": 2, "b": 2}, {"a": 2, "b": 1}, {"a": 1, "b": 1},
    ]  # fmt: skip


def test_what_is_not_legal_is_no_candidate():
    axes = [axis("a", 0.5, 0.0), axis("b", 0.5, 0.0)]
    found = table(axes, [(1, 1)] * 4, lambda sizes: sizes["a"] >= sizes["b"])
    assert [tuple(one.sizes.values()) for one in found] == [(1, 1), (2, 1), (2, 2)]


def test_more_combinations_than_can_be_tried():
    with pytest.raises(InvalidInput, match="1,000,000 combinations of sizes are more than 50,000: lower steps"):
        candidates([axis(name, *([0.0] * 100)) for name in "abc"], lambda sizes: True, lambda sizes: {})
