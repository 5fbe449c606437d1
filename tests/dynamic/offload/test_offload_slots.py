"""Which units are in memory: whatever tokens ask for is there afterwards, in a slot of its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity.dynamic.offload.layout import lay_out
from sparity.dynamic.offload.placement import Costs
from sparity.dynamic.offload.slots import Slots, Staging
from sparity.errors import InvalidInput

UNITS = 12


def sets():
    return st.lists(st.integers(0, UNITS - 1), unique=True).map(lambda found: np.array(sorted(found), dtype=np.int64))


def perform(memory, load):
    """What reading does: slot -> unit."""
    assert len(set(load.slots.tolist())) == len(load.slots) == len(load.units)
    memory.update(zip(load.slots.tolist(), load.units.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), sets(), sets()), max_size=12),
    st.integers(0, 5),
    st.integers(0, 6),
    st.sampled_from([None, 1, 3]),
)
def test_what_is_asked_for_is_there(calls, hot, room, window):
    staging = Staging(2 * (hot + room), UNITS - hot - room)
    layers = [
        Slots(UNITS, np.arange(hot), first * (hot + room), room, staging, window) for first in range(2)
    ]  # fmt: skip
    memory = {layer.begin + unit: unit for layer in layers for unit in range(hot)}
    for index, units, expected in calls:
        layer = layers[index]
        perform(memory, layer.ahead(expected))
        before = set(layer.held.tolist())
        load, ahead = layer.take(units)
        perform(memory, load)
        assert {*load.units.tolist()} >= {*units.tolist()} - before  # staged ones of an earlier set are gone
        assert window or not before & {*load.units.tolist()}  # what is let go of may be needed again
        assert ahead <= len(units)
        assert [memory[slot] for slot in layer.slot_of[units]] == units.tolist()
        for each in layers:
            slots = each.slot_of[each.held].tolist()
            assert len(set(slots)) == len(slots)
            assert set(range(hot)) <= {*each.held.tolist()}
    assert set(memory) <= set(range(staging.first + staging.count))


@settings(max_examples=40, deadline=None)
@given(st.lists(sets(), min_size=1, max_size=10), st.integers(1, 4))
def test_a_window_holds_the_union_of_the_last_tokens(tokens, window):
    """LLM in a flash: what the last k tokens used stays, and only the difference is loaded."""
    slots = Slots(UNITS, np.empty(0, np.int64), 0, UNITS, Staging(UNITS, 0), window)
    for number, units in enumerate(tokens):
        recent = [set(found.tolist()) for found in tokens[max(number - window, 0) : number]]
        load, _ = slots.take(units)
        assert load.units.tolist() == sorted({*units.tolist()} - set().union(*recent))
        assert slots.held.tolist() == sorted({*units.tolist()}.union(*recent))


def test_the_longest_unused_goes_first_and_a_flood_drives_nothing_out():
    staging = Staging(3, 4)
    slots = Slots(8, np.array([5]), 0, 2, staging)
    assert slots.hot_range == (0, 1)
    for units, missing, held in (
        ([1], [1], [1, 5]),
        ([2, 5], [2], [1, 2, 5]),
        ([1], [], [1, 2, 5]),
        ([3], [3], [1, 3, 5]),  # 2 was unused for longest
        ([0, 1, 2, 3, 4], [0, 2, 4], [0, 1, 2, 3, 4, 5]),  # more than there is room for: staged
        ([1, 3], [], [1, 3, 5]),
    ):
        load, _ = slots.take(np.array(units))
        assert load.units.tolist() == missing
        assert slots.held.tolist() == held


def test_what_is_read_ahead_is_counted_and_takes_no_more_than_there_is_room_for():
    slots = Slots(8, np.empty(0, np.int64), 0, 2, Staging(2, 6))
    slots.take(np.array([0, 1]))
    assert slots.ahead(np.array([1, 2, 3])).units.tolist() == [2]  # 1 is kept, 0 makes room
    load, ahead = slots.take(np.array([2, 4]))
    assert (load.units.tolist(), ahead) == ([4], 1)
    load = slots.ahead(np.array([6]))
    slots.forget(load)  # it could not be read
    assert 6 not in slots.held
    assert slots.take(np.array([6]))[0].units.tolist() == [6]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(0, 30),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from([2, 9]),
)
def test_a_layout_fits_and_is_enough_for_any_layer(frequencies, slots, share, at_once):
    layers = [np.array(layer) for layer in frequencies]
    most = max(min(len(layer), at_once) for layer in layers)
    if slots < most:
        with pytest.raises(InvalidInput, match=f"room for {slots} of the {most} units"):
            lay_out(layers, slots, at_once, share)
        return
    found = lay_out(layers, slots, at_once, share)
    assert found.slots <= slots
    own = [len(hot) + room for hot, room in zip(found.hot, found.room, strict=True)]
    for layer, count in zip(layers, own, strict=True):
        assert count <= len(layer)
        assert count + found.staged >= min(len(layer), at_once)
    if slots >= sum(map(len, layers)) + most:
        assert own == [len(layer) for layer in layers]
    firsts = [each.begin for each in found.slots_of([len(layer) for layer in layers])]
    assert firsts == np.cumsum([0, *own[:-1]]).tolist()


def test_memory_goes_where_units_are_needed():
    often, seldom = np.full(8, 0.5), np.full(8, 0.125)
    found = lay_out([often, seldom], 15, 4, 0.0)
    assert (sum(found.room), found.staged) == (11, 4)  # 12 would leave 3, and need 4
    assert found.room[0] > found.room[1]
    hot = lay_out([often, seldom], 12, 4, 1.0, Costs(near=0.0, far=1.0)).hot
    assert [len(units) for units in hot] == [8, 0]
