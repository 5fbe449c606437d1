"""How often evidence errs, and how soon it finds a change: over many simulated streams."""

import numpy as np
import pytest

from sparity.serve.guard.evidence import MOST, SHARES, Above, Below

BOUND, LEVEL, STREAMS, LENGTH = 0.1, 0.01, 400, 10_000


def drawn(kind, mean, size, random):
    """Numbers from 0 on with that mean, from narrow to heavy-tailed."""
    if kind == "constant":
        return np.full(size, mean)
    if kind == "exponential":
        return random.exponential(mean, size)
    if kind == "lognormal":
        return random.lognormal(np.log(mean) - 2.0, 2.0, size)
    return np.where(random.random(size) < 0.01, 100 * mean, 0.0)  # rare and large


KINDS = ["constant", "exponential", "lognormal", "rare"]


def ever(test, kind, mean, length=LENGTH):
    """The share of streams in which the evidence ever reaches 1 / LEVEL."""
    random, reached = np.random.default_rng(0), np.zeros(STREAMS, bool)
    for _ in range(length):
        reached |= test.add(drawn(kind, mean, STREAMS, random)) >= 1 / LEVEL
    return float(reached.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_false_alarms_are_as_rare_as_promised_even_at_the_bound(kind):
    """400 streams of 10,000 answers: at a rate of 1 % more than 11 alarms come less than once in 1,000 times."""
    assert ever(Above(BOUND, STREAMS), kind, BOUND) <= 11 / STREAMS


@pytest.mark.parametrize("kind", KINDS)
def test_clean_answers_raise_none(kind):
    assert ever(Above(BOUND, STREAMS), kind, BOUND / 5, 2000) == 0


@pytest.mark.parametrize("kind", ["constant", "exponential"])
def test_a_return_is_as_rare_as_promised_while_quality_is_low(kind):
    test, random, reached = Below(BOUND, STREAMS), np.random.default_rng(1), np.zeros(STREAMS, bool)
    cut = np.minimum(
        drawn(kind, 1.0, 10**6, random), MOST
    ).mean()  # what is cut lowers the mean: it counts as it is then
    for _ in range(2000):
        reached |= test.add(drawn(kind, BOUND / cut, STREAMS, random)) >= 1 / LEVEL
    assert reached.mean() <= 11 / STREAMS


@pytest.mark.parametrize(("before", "most"), [(0, 25), (1000, 60)])
def test_a_change_is_found_soon(before, most):
    """The mean rises from a fifth of the bound to three times it: answers until half of the streams have noticed."""
    test, random, found = Above(BOUND, STREAMS), np.random.default_rng(2), []
    for _ in range(before):
        test.add(drawn("exponential", BOUND / 5, STREAMS, random))
    reached = np.zeros(STREAMS, bool)
    while reached.mean() < 0.5:
        reached |= test.add(drawn("exponential", 3 * BOUND, STREAMS, random)) >= 1 / LEVEL
        found.append(reached.mean())
    assert len(found) < most


@pytest.mark.parametrize(("before", "most"), [(0, 60), (1000, 120)])
def test_the_way_back_is_found_soon(before, most):
    test, random, reached, steps = Below(BOUND, STREAMS), np.random.default_rng(3), np.zeros(STREAMS, bool), 0
    for _ in range(before):
        test.add(drawn("exponential", 3 * BOUND, STREAMS, random))
    while reached.mean() < 0.5:
        reached |= test.add(drawn("exponential", BOUND / 5, STREAMS, random)) >= 1 / LEVEL
        steps += 1
    assert steps < most


def test_the_first_two_bets_by_hand():
    above, below = Above(0.5), Below(0.5)
    first = np.mean(1 / 2 * (1 + SHARES * (2 - 1)))
    assert above.add(1.0) == pytest.approx(first)
    second = np.mean((1 / 2 * (1 + SHARES) + 1 / 6) * (1 - SHARES))
    assert above.add(0.0) == pytest.approx(second)
    assert below.add(0.0) == pytest.approx(np.mean(1 / 2 * (1 + SHARES / 4)))
    assert below.add(100.0) == pytest.approx(np.mean((1 / 2 * (1 + SHARES / 4) + 1 / 6) * (1 - SHARES)))
