"""The exact knapsack: hand-made tables, every choice tried, pairs."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity.budgets.optimum.multiple_choice import _standard_output_as_errors, multiple_choice

ITEMS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=4)
TABLES = st.lists(ITEMS, min_size=1, max_size=4)


def test_a_table_by_hand():
    values = [[10.0, 6.0, 3.0], [10.0, 7.0]]
    losses = [[0.0, 2.0, 5.0], [0.0, 3.0]]
    gains = [[-loss for loss in group] for group in losses]
    found = {most: multiple_choice(values, gains, -most) for most in (0.0, 1.9, 2.0, 4.9, 5.0, 8.0)}
    # 20 | 20 | 16 | 16 | 13 both by (0, 5) and by (2, 3): either | 10
    assert [found[most] for most in (0.0, 1.9, 2.0, 4.9, 8.0)] == [[0, 0], [0, 0], [1, 0], [1, 0], [2, 1]]
    assert found[5.0] in ([2, 0], [1, 1])
    assert multiple_choice(values, gains, 0.1) is None


def test_a_pair_that_loses_less_together_is_found():
    values, gains = [[4.0, 1.0], [4.0, 1.0]], [[0.0, -2.0], [0.0, -2.0]]
    assert multiple_choice(values, gains, -3.0) in ([0, 1], [1, 0])
    together = {(0, 1): np.array([[0.0, 0.0], [0.0, 1.0]])}  # both lose 3, not 4
    assert multiple_choice(values, gains, -3.0, together) == [1, 1]
    apart = {(0, 1): np.array([[0.0, 0.0], [0.0, -1.0]])}
    assert multiple_choice(values, gains, -4.0, apart) in ([0, 1], [1, 0])


@settings(max_examples=25, deadline=None)
@given(TABLES, st.integers(-40, 100), st.data())
def test_it_is_the_best_of_all_choices(groups, least, data):
    values = [[float(value) for value, _ in group] for group in groups]
    weights = [[float(weight) for _, weight in group] for group in groups]
    pairs = {}
    if len(groups) > 1 and data.draw(st.booleans()):
        shape = (len(groups[0]), len(groups[1]))
        cells = data.draw(st.lists(st.integers(-9, 9), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
        pairs = {(0, 1): np.array(cells, dtype=float).reshape(shape)}

    def weight(picks):
        extra = sum(table[picks[one], picks[other]] for (one, other), table in pairs.items())
        return sum(weights[group][pick] for group, pick in enumerate(picks)) + extra

    def value(picks):
        return sum(values[group][pick] for group, pick in enumerate(picks))

    allowed = [p for p in itertools.product(*(range(len(group)) for group in groups)) if weight(p) >= least]
    found = multiple_choice(values, weights, float(least), pairs)
    assert (found is None) == (not allowed)
    if found is not None:
        assert weight(found) >= least - 1e-3  # HiGHS's own tolerance; the numbers are whole
        assert value(found) == pytest.approx(min(map(value, allowed)))


def test_what_highs_says_is_no_output(capfd):
    with _standard_output_as_errors():
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\na message")
    print("after")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("after\n", "a message")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([-1.0, 0.0, 1e-9, 3e-9, 1e-4, 2.0]), min_size=2, max_size=3), min_size=2, max_size=4
    ),
    st.integers(0, 6),
)
def test_small_values_count_beside_large_ones(values, least):
    gains = [list(range(len(group))) for group in values]
    found = multiple_choice(values, gains, least)
    picks = list(itertools.product(*(range(len(group)) for group in values)))
    legal = [pick for pick in picks if sum(pick) >= least]
    totals = [sum(group[item] for group, item in zip(values, pick, strict=True)) for pick in legal]
    if not totals:
        assert found is None
        return
    assert sum(found) >= least
    lowest = sum(min(group) for group in values)
    total = sum(group[item] for group, item in zip(values, found, strict=True))
    assert total - lowest == pytest.approx(min(totals) - lowest, rel=1e-5, abs=1e-15)
