"""Hot units: by sorting, and by the mixed-integer programme against every placement there is."""

import itertools

import numpy as np
import pytest

from sparity.dynamic.offload.placement import Costs, by_frequency, by_programme, time_of
from sparity.errors import InvalidInput

LAYERS = [np.array([0.1, 0.9, 0.5, 0.3]), np.array([0.8, 0.2, 0.7])]


def lists(found):
    return [units.tolist() for units in found]


def test_the_most_frequent_of_all_layers():
    assert lists(by_frequency(LAYERS, 3)) == [[1], [0, 2]]
    assert lists(by_frequency(LAYERS, 0)) == [[], []]
    assert lists(by_frequency(LAYERS, 99)) == [[0, 1, 2, 3], [0, 1, 2]]
    assert lists(by_frequency([np.full(3, 0.5)] * 2, 4)) == [[0, 1, 2], [0]]  # of equals the first


def every_placement(layers, room):
    for flags in itertools.product([0, 1], repeat=sum(map(len, layers))):
        if sum(flags) <= room:
            cut = np.split(np.array(flags), np.cumsum([len(layer) for layer in layers])[:-1])
            yield [np.flatnonzero(part) for part in cut]


@pytest.mark.parametrize("room", [0, 2, 3, 5, 7])
@pytest.mark.parametrize("costs", [Costs(0.0, 1.0), Costs(0.2, 1.0), Costs(0.05, 1.0, 0.6), Costs(1.0, 0.1)], ids=str)
def test_the_programme_is_as_good_as_the_best_of_all(room, costs):
    found = by_programme(LAYERS, room, costs, group=1)
    assert sum(map(len, found)) <= room
    best = min(time_of(LAYERS, placement, costs) for placement in every_placement(LAYERS, room))
    assert time_of(LAYERS, found, costs) == pytest.approx(best, rel=1e-3, abs=1e-6)


def test_where_memory_costs_nothing_sorting_is_as_good():
    draw, costs = np.random.default_rng(0), Costs(0.0, 3e-6)
    layers = [draw.beta(0.3, 2, 64) for _ in range(4)]
    sorted_, solved = by_frequency(layers, 80), by_programme(layers, 80, costs, group=1)
    assert time_of(layers, solved, costs) == pytest.approx(time_of(layers, sorted_, costs), rel=1e-3)


def test_groups_are_placed_together():
    layer = np.array([0.9, 0.1, 0.8, 0.2])
    assert lists(by_programme([layer], 2, Costs(0.0, 1.0), group=2)) == [[0, 2]]
    assert lists(by_programme([layer], 1, Costs(0.0, 1.0), group=2)) == [[]]


def test_costs_that_make_no_sense_are_refused():
    for costs, group in ((Costs(-1, 1), 1), (Costs(0, np.inf), 1), (Costs(0, 1), 0)):
        with pytest.raises(InvalidInput, match="placement: costs must be finite"):
            by_programme(LAYERS, 1, costs, group)
