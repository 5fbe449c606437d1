"""Shares of domains by hand, and whose sequence comes next."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from workspaces import Notes

from sparity.training.fine_tune.mixture import SHARES, Mixture, SharesKept, updated_shares


def shares(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_an_update_by_hand():
    # softmax(log w + d): 0.5 e^0.2 and 0.5 e^0 over their sum, then (1 - c) of it and c / 2
    large = math.exp(0.2) / (math.exp(0.2) + 1)
    found = updated_shares(shares(0.5, 0.5), shares(0.2, 0.0))
    assert found.tolist() == pytest.approx([0.9999 * large + 5e-5, 0.9999 * (1 - large) + 5e-5], abs=1e-12)
    found = updated_shares(shares(0.6, 0.3, 0.1), shares(0.0, 1.0, -1.0), speed=0.5, floor=0.3)
    raised = [0.6, 0.3 * math.exp(0.5), 0.1 * math.exp(-0.5)]
    assert found.tolist() == pytest.approx([0.7 * x / sum(raised) + 0.1 for x in raised], abs=1e-12)


@given(st.lists(st.tuples(st.floats(1e-3, 1), st.floats(-5, 5)), min_size=2, max_size=6), st.floats(0, 1))
def test_shares_sum_to_one_and_none_is_lost(domains, floor):
    start = shares(*(weight for weight, _ in domains))
    found = updated_shares(start / start.sum(), shares(*(excess for _, excess in domains)), floor=floor)
    assert float(found.sum()) == pytest.approx(1)
    assert float(found.min()) >= floor / len(domains) - 1e-12


def test_equal_lags_move_nothing_but_towards_equal_shares():
    found = updated_shares(shares(0.8, 0.2), shares(0.7, 0.7), floor=1e-4)
    assert found.tolist() == pytest.approx([0.8 * 0.9999 + 5e-5, 0.2 * 0.9999 + 5e-5])


def test_sequences_by_hand():
    mixture = Mixture([3, 2], batch=4, every=2, shares=[shares(0.75, 0.25)])
    # due before each: (.75 .25) (1.5 .5) (2.25 .75) (3 1): the lag is largest in 0, 0, then 1 (.25 against .75), then 0
    assert mixture.of_step(0) == [(0, 0), (0, 1), (1, 0), (0, 2)]
    assert not mixture.updates(0)
    assert not mixture.updates(1)
    assert mixture.of_step(1) == [(0, 0), (0, 1), (1, 1), (0, 2)]
    assert mixture.updates(2)
    mixture.shares.append(shares(0.0, 1.0))
    assert not mixture.updates(2)
    assert mixture.of_step(2) == [(1, 0), (1, 1), (1, 0), (1, 1)]


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(1, 40))
def test_every_domain_has_what_its_share_says_within_one_per_domain(weights, steps):
    share = shares(*weights) / sum(weights)
    mixture = Mixture([7] * len(weights), batch=3, every=1000, shares=[share])
    taken = [domain for step in range(steps) for domain, _ in mixture.of_step(step)]
    for domain, wanted in enumerate((share * len(taken)).tolist()):
        assert abs(taken.count(domain) - wanted) < len(weights)


def test_a_resumed_mixture_goes_on_as_if_it_had_not_stopped():
    history = [shares(0.7, 0.3), shares(0.2, 0.8), shares(0.5, 0.5)]
    whole = Mixture([5, 3], batch=2, every=3, shares=history)
    expected = [whole.of_step(step) for step in range(9)]
    work = Notes()
    SharesKept(work, history[:2]).save(5, {"weight": torch.zeros(1)})
    found = [shares(1.0, 0.0)]
    kept = SharesKept(work, found)
    assert kept.last()[1].keys() == {"weight", SHARES}
    resumed = Mixture([5, 3], batch=2, every=3, shares=found)
    assert resumed.of_step(5) == expected[5]
    assert resumed.updates(6)
    found.append(history[2])
    assert [resumed.of_step(step) for step in (6, 7, 8)] == expected[6:]
