"""Paired statistics: by hand, against scipy, and by adding up all samples that there can be."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest, norm

from sparity.errors import InvalidInput
from sparity.quality.paired import (
    Pairs,
    bootstrap,
    drop_score,
    items_needed,
    largest_drop,
    mcnemar,
    smallest_difference,
)

COUNTS = st.integers(0, 60)


def test_pairs_are_counted():
    pairs = Pairs.of([1, 1, 0, 0, 1], [1, 0, 1, 0, 0])
    assert pairs == Pairs(both=1, lost=2, won=1, neither=1)
    assert (pairs.items, pairs.discordant, pairs.change) == (5, 0.6, -0.2)


def test_mcnemar_by_hand():
    assert mcnemar(Pairs(5, 1, 4, 0)) == 2 * (1 + 5) / 2**5  # 0 or 1 of 5 coins
    assert mcnemar(Pairs(5, 0, 6, 9)) == 2 / 2**6
    assert mcnemar(Pairs(5, 3, 3, 0)) == 1
    assert mcnemar(Pairs(5, 0, 0, 5)) == 1


@given(COUNTS, COUNTS)
def test_mcnemar_is_the_binomial_test(lost, won):
    expected = binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1
    assert mcnemar(Pairs(3, lost, won, 2)) == pytest.approx(expected, rel=1e-12)


def test_bootstrap_of_one_item_more_or_less():
    """Three of four items alike, one lost: the number of losses in a sample is binomial (4, 1/4)."""
    low, high = bootstrap([1, 1, 0, 1], [1, 1, 0, 0], confidence=0.5, draws=200_000)
    assert (low, high) == tuple(-binom.ppf([0.75, 0.25], 4, 0.25) / 4)


def test_bootstrap_of_any_numbers_agrees_with_the_normal_distribution():
    draw = np.random.default_rng(1)
    first, noise = draw.normal(size=400), draw.normal(0.1, 0.5, size=400)
    low, high = bootstrap(first, first + noise)
    error = noise.std() / math.sqrt(400)
    assert low == pytest.approx(noise.mean() - 1.96 * error, abs=0.005)
    assert high == pytest.approx(noise.mean() + 1.96 * error, abs=0.005)


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=1, max_size=40))
def test_bootstrap_holds_the_difference_and_turns_with_it(items):
    first, second = zip(*items, strict=True)
    low, high = bootstrap(first, second, draws=400)
    assert low <= high
    assert bootstrap(first, second, draws=400) == (low, high)
    assert bootstrap(first, first, draws=400) == (0, 0)


@given(COUNTS, COUNTS, COUNTS, st.floats(0.001, 0.9))
def test_the_score_takes_the_most_likely_shares(rest, lost, won, drop):
    """The variance rests on the shares that are most likely among those with this drop; found here by search."""
    pairs = Pairs(rest + 1, lost, won, 0)
    same = pairs.items - lost - won

    def unlikely(share):
        parts = ((lost, share + drop), (won, share), (same, 1 - drop - 2 * share))
        return -sum(count * math.log(max(part, 1e-300)) for count, part in parts if count)

    found = minimize_scalar(unlikely, bounds=(0, (1 - drop) / 2), method="bounded", options={"xatol": 1e-10}).x
    variance = pairs.items * (2 * found + drop - drop**2)
    expected = (lost - won + 0.5 - pairs.items * drop) / math.sqrt(variance)
    assert drop_score(pairs, drop) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("items", "drop"), [(40, 0.05), (200, 0.01), (200, 0.05), (1267, 0.01), (1267, 0.02)])
@pytest.mark.parametrize("won", [0, 0.005, 0.02, 0.1, 0.3])
def test_a_gate_passes_a_model_at_its_limit_in_at_most_5_percent_of_samples(items, drop, won):
    """Added up over all samples, not drawn."""
    lost = won + drop
    passed = 0.0
    for differing in range(*(int(found) for found in binom.ppf([1e-7, 1 - 1e-7], items, lost + won))):
        counts = np.arange(differing + 1)
        # the statistic falls as fewer are lost: the largest count that passes is found by bisection
        low, high = -1, differing
        while low < high:
            middle = (low + high + 1) // 2
            pairs = Pairs(0, middle, differing - middle, items - differing)
            low, high = (middle, high) if drop_score(pairs, drop) <= -norm.ppf(0.95) else (low, middle - 1)
        likely = binom.pmf(counts, differing, lost / (lost + won))
        passed += binom.pmf(differing, items, lost + won) * likely[: low + 1].sum()
    assert passed <= 0.05


@given(COUNTS, COUNTS, COUNTS)
def test_the_largest_drop_is_where_the_score_crosses(rest, lost, won):
    pairs = Pairs(rest + 1, lost, won, 0)
    found = largest_drop(pairs)
    assert found > -pairs.change - 1e-12  # the sample's own drop is not ruled out
    assert drop_score(pairs, min(found + 1e-6, 1)) <= -norm.ppf(0.95) + 1e-6
    assert drop_score(pairs, found - 1e-6) >= -norm.ppf(0.95) - 1e-2


def test_no_difference_seen_rules_out_no_more_than_the_items_can():
    assert bootstrap([1] * 50, [1] * 50) == (0, 0)
    assert 0.05 < largest_drop(Pairs(50, 0, 0, 0)) < 0.09  # three items of 50 may well be lost unseen
    assert largest_drop(Pairs(5000, 0, 0, 0)) < 0.001


def test_the_smallest_difference_by_hand():
    """One item in ten differs: (1.96 sqrt(.1) + 0.8416 sqrt(.1 - d^2)) / sqrt(n) is d."""
    for items in (100, 1000, 10_000):
        found = smallest_difference(items, 0.1)
        by_hand = (norm.ppf(0.975) * math.sqrt(0.1) + norm.ppf(0.8) * math.sqrt(0.1 - found**2)) / math.sqrt(items)
        assert found == pytest.approx(by_hand, rel=1e-9)
    assert smallest_difference(100, 0.1) == pytest.approx(0.0876, abs=1e-4)
    assert smallest_difference(3, 0.0) == 1  # such a sample shows nothing


def test_the_planner_by_hand():
    needed = items_needed(0.01, 0.1)
    roughly = ((norm.ppf(0.95) + norm.ppf(0.8)) ** 2 * 0.1) / 0.01**2  # where the limit is small beside the discordance
    assert needed == pytest.approx(roughly + 100, rel=0.01)
    assert items_needed(0.05, 0.1) < items_needed(0.05, 0.2) < items_needed(0.05, 0.2, true_drop=0.02)


def test_the_planned_sample_passes_an_unharmed_model_as_often_as_planned():
    items = items_needed(0.05, 0.1)
    passed = 0.0
    for differing in range(items + 1):
        weight = binom.pmf(differing, items, 0.1)
        if weight < 1e-6:
            continue
        for lost in range(differing + 1):
            pairs = Pairs(0, lost, differing - lost, items - differing)
            if drop_score(pairs, 0.05) <= -norm.ppf(0.95):
                passed += weight * binom.pmf(lost, differing, 0.5)
    assert passed == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Pairs.of([1, 0], [1]), "same"),
        (lambda: Pairs.of([], []), "at least one"),
        (lambda: Pairs.of([0.5], [1]), "bootstrap"),
        (lambda: bootstrap([math.nan], [1]), "finite"),
        (lambda: smallest_difference(0, 0.1), "at least one"),
        (lambda: items_needed(0.01, 0.1, true_drop=0.01), "under the limit"),
        (lambda: largest_drop(Pairs(1, 1, 1, 1), confidence=1.0), "between"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


def test_all_tables_of_few_items_give_limits_in_order():
    """One loss more never lowers the limit, one gain more never raises it."""
    for lost, won in itertools.product(range(5), repeat=2):
        here = largest_drop(Pairs(20 - lost - won, lost, won, 0))
        assert largest_drop(Pairs(19 - lost - won, lost + 1, won, 0)) > here
        assert largest_drop(Pairs(19 - lost - won, lost, won + 1, 0)) < here + 1e-12
