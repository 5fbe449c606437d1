"""Orders of columns under an N:M pattern: never worse, the best where it can be told, and legal."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity.errors import InvalidInput
from sparity.static.permute.search import column_order, kept_score


def test_by_hand():
    """Four columns that matter stand in one group; two and two, nothing of them is lost."""
    scores = torch.tensor([[9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0]])
    assert kept_score(scores, 2, 4) == 9 + 9 + 1 + 1
    order = column_order(scores, 2, 4, sweeps=4)
    assert kept_score(scores[:, order], 2, 4) == 36
    assert sorted(sum(column < 4 for column in group) for group in order.view(2, 4).tolist()) == [2, 2]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 30),
    st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 3), (4, 4)]),
    st.integers(0, 3),
    st.integers(0, 10),
)
def test_an_order_is_a_permutation_that_keeps_no_less(rows, columns, pattern, sweeps, seed):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    order = column_order(scores, *pattern, sweeps, seed)
    assert order.sort().values.tolist() == list(range(columns))
    assert kept_score(scores[:, order], *pattern) >= kept_score(scores, *pattern)
    assert torch.equal(order, column_order(scores, *pattern, sweeps, seed))
    whole = columns - columns % pattern[1]
    assert order[whole:].tolist() == list(range(whole, columns))


@pytest.mark.parametrize("seed", range(6))
def test_two_groups_of_two_are_as_good_as_the_best_of_all(seed):
    """1:2 on four columns: three ways to pair them, of which the sweeps find the best."""
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
    best = max(kept_score(scores[:, list(order)], 1, 2) for order in itertools.permutations(range(4)))
    assert kept_score(scores[:, column_order(scores, 1, 2, sweeps=10)], 1, 2) == pytest.approx(best)


def test_more_groups_than_exchange_at_once(monkeypatch):
    monkeypatch.setattr("sparity.static.permute.search.PART", 4)
    scores = torch.rand(8, 80, generator=torch.Generator().manual_seed(0)) ** 4
    order = column_order(scores, 2, 4, sweeps=5)
    assert sorted(order.tolist()) == list(range(80))
    assert kept_score(scores[:, order], 2, 4) > 1.02 * kept_score(scores, 2, 4)


@pytest.mark.parametrize(
    ("scores", "pattern", "words"),
    [
        (torch.tensor([[1.0, -1.0]]), (1, 2), "negative, NaN or infinite"),
        (torch.tensor([[1.0, torch.nan]]), (1, 2), "negative, NaN or infinite"),
        (torch.tensor([[1.0, torch.inf]]), (1, 2), "negative, NaN or infinite"),
        (torch.ones(1, 4), (3, 2), "N columns are kept of M"),
        (torch.ones(1, 4), (0, 2), "N columns are kept of M"),
    ],
)
def test_what_it_refuses(scores, pattern, words):
    with pytest.raises(InvalidInput, match=words):
        column_order(scores, *pattern, sweeps=1)
