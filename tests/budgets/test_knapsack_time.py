"""Knapsack over milliseconds: the best of all choices by a table of times, and where the times come from."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity import registry
from sparity.budgets.base import Site, between
from sparity.engine.kernels import choice_file
from sparity.errors import InvalidInput, SparityError
from sparity.stages import kernel_time

LEVELS = (0.0, 0.3, 0.5, 0.7)


def build(**options):
    return registry.build("budget", {"knapsack": {"cost": "milliseconds", **options}})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 40), min_size=4, max_size=4), st.lists(st.floats(0.1, 9), min_size=3, max_size=3)
        ),
        min_size=2,
        max_size=4,
    )
)
def test_it_is_the_best_of_all_choices_that_are_as_fast(found):
    """Times in whole microseconds, in any order: a kernel may be slower than dense, or no faster where more is gone."""
    times = [dict(zip(LEVELS, (0.001 * each for each in measured), strict=True)) for measured, _ in found]
    losses = [dict(zip(LEVELS, (0.0, *loss), strict=True)) for _, loss in found]
    sites = [Site(str(i), 7.0, milliseconds=between(table)) for i, table in enumerate(times)]

    def level(share):
        return min(LEVELS, key=lambda each: abs(each - share))

    def loss(shares):
        return sum(losses[int(name)][level(share)] for name, share in shares.items())

    def taken(pick):
        return sum(times[i][level(share)] for i, share in enumerate(pick))

    shares = build(step=0.2, spread=0.2).allocate(sites, 0.5, loss)
    fast_enough = [
        pick for pick in itertools.product(LEVELS, repeat=len(sites)) if taken(pick) <= taken([0.5] * len(sites)) + 1e-9
    ]
    best = min(sum(losses[i][share] for i, share in enumerate(pick)) for pick in fast_enough)
    assert loss(shares) == pytest.approx(best)
    assert taken(shares.values()) <= taken([0.5] * len(sites)) + 1e-9


def test_a_matrix_whose_kernel_gains_nothing_stays_dense():
    """Of three, `small` takes as long at any sparsity: the others alone need not give up more than before."""
    gains = between({0.0: 1.0, 1.0: 0.0})
    sites = [
        Site("small", 1.0, milliseconds=lambda share: 0.1),
        Site("a", 10.0, milliseconds=gains),
        Site("b", 10.0, milliseconds=gains),
    ]
    shares = build().allocate(sites, 0.5, lambda shares: sum(share**2 for share in shares.values()))
    assert shares == pytest.approx({"small": 0.0, "a": 0.5, "b": 0.5})


def test_straight_lines_between_the_entries_of_a_table():
    value = between({0.5: 3.0, 0.0: 4.0, 1.0: 1.0})
    assert [value(share) for share in (-1, 0, 0.25, 0.5, 0.75, 1, 2)] == [4.0, 4.0, 3.5, 3.0, 2.0, 1.0, 1.0]
    assert between({0.5: 2.0})(0.7) == 2.0


def test_a_stage_that_knows_no_times():
    with pytest.raises(InvalidInput, match=r"not known how long a takes: use `cost: parameters`"):
        build().allocate([Site("a", 1.0), Site("b", 1.0)], 0.5, lambda shares: 1.0)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A timer that says 10 ms for dense, and 2 ms and the density for bitmask; the densities that it saw."""
    monkeypatch.setenv("SPARITY_CACHE", str(tmp_path))
    monkeypatch.setattr(choice_file, "_known", {})
    kernel_time.timed.cache_clear()
    seen = []

    def timer(calls):
        kept = float((calls["bitmask"].func.packed.tensors["values"] != 0).sum()) / (64 * 32)
        assert torch.equal(calls["bitmask"]().isfinite(), torch.ones(1, 64, dtype=torch.bool))
        seen.append(round(kept, 3))
        return {"dense": 0.010, "bitmask": 0.002 + 0.012 * kept}

    monkeypatch.setattr(kernel_time, "default_timer", lambda: timer)
    yield seen
    kernel_time.timed.cache_clear()


def test_times_of_pruned_matrices_are_measured_once_and_remembered(clock, monkeypatch):
    matrix = SimpleNamespace(weight=torch.empty(64, 32, dtype=torch.bfloat16, device="meta"))
    assert kernel_time.kernel_milliseconds(matrix, 0.5) == pytest.approx(8.0)
    assert kernel_time.kernel_milliseconds(matrix, 0.52) == pytest.approx(8.0 - 12 * 0.02, abs=0.01)
    assert kernel_time.kernel_milliseconds(matrix, 0.0) == pytest.approx(10.0)  # dense
    assert kernel_time.kernel_milliseconds(matrix, 1.0) == pytest.approx(2.0)
    assert sorted(clock) == pytest.approx([0.0, 0.05, 0.45, 0.5, 0.95, 1.0], abs=1e-3)
    kernel_time.timed.cache_clear()
    monkeypatch.setattr(choice_file, "_known", {})
    assert kernel_time.kernel_milliseconds(matrix, 0.5) == pytest.approx(8.0)
    assert len(clock) == 6


def test_times_that_cannot_be_had(clock, monkeypatch):
    matrix = SimpleNamespace(weight=torch.empty(64, 32, dtype=torch.bfloat16, device="meta"))
    monkeypatch.setattr(kernel_time, "default_timer", lambda: lambda calls: None)
    with pytest.raises(SparityError, match="too busy to time its kernels"):
        kernel_time.kernel_milliseconds(matrix, 0.3)
    monkeypatch.setattr(kernel_time, "default_timer", lambda: None)
    with pytest.raises(InvalidInput, match="SPARITY_CHOICE=rules turns off"):
        kernel_time.kernel_milliseconds(matrix, 0.3)


def test_bytes_of_channels_that_are_skipped_have_no_mask():
    budget = registry.build("budget", {"knapsack": {"cost": "bytes"}})
    few = [Site("masked", 8.0, bytes=16.0), Site("skipped", 8.0, bytes=16.0, mask=False)]
    assert [budget._saved(site, 0.5) for site in few] == [7.0, 8.0]
    assert [budget._saved(site, 0.0) for site in few] == [0.0, 0.0]
