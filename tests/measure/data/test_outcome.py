"""What all stages together made of every projection."""

import math
from dataclasses import replace

import pytest

from sparity.measure.data.outcome import Totals, asks_for_zeros, mean, mean_by_cell


def totals(kinds, kind):
    return kinds[kind].candidates[0].totals


def test_a_projection_is_one_outcome_of_all_stages_that_touched_it(kinds):
    found = {each.name: each for each in totals(kinds, "all").outcomes}
    assert len(found) == 8
    down, query = found["model.layers.1.mlp.down_proj"], found["model.layers.0.self_attn.q_proj"]
    assert [change.stage for change in down.changes] == ["prune", "structure", "activations"]
    assert [change.stage for change in query.changes] == ["prune", "activations"]
    assert (down.cell, down.shapes, down.left) == ((1, "down"), ((4, 8), (4, 6)), 0.75)
    assert (down.zeros, down.skipped, down.skip_target, down.bits) == (0.5, 0.45, 0.4, None)
    assert down.needed == pytest.approx(24 * 0.5 * 0.55)
    assert (query.reshaped, query.left) == (False, 1.0)


def test_a_later_stage_that_says_nothing_of_skipping_or_bits_leaves_them(kinds):
    """Thresholds, then another stage on the same projection: what was skipped and how it is stored stays."""
    change = kinds["skipping"].candidates[0].changes[0]
    first = replace(change, bits=4.0)
    (found,) = Totals.of((first, replace(change, stage="cache", skipped=None, target=None))).outcomes
    assert (found.skipped, found.skip_target, found.bits) == (0.35, 0.4, 4.0)


@pytest.mark.parametrize(
    ("kind", "zeros", "target", "skipped", "skip_target", "bits"),
    [
        ("pruned", 0.5, 0.5, None, None, None),
        ("cut", None, None, None, None, None),
        ("skipping", None, None, 0.41, 0.4, None),
        ("quantised", None, None, None, None, 512 / 112),
        ("healed", None, None, None, None, None),
        ("nothing", None, None, None, None, None),
        ("all", 0.5, 0.5, 7.3 / 18, 0.4, None),
    ],
)
def test_totals_of_every_kind(kinds, kind, zeros, target, skipped, skip_target, bits):
    found = totals(kinds, kind)
    expected = [
        None if value is None else pytest.approx(value) for value in (zeros, target, skipped, skip_target, bits)
    ]
    assert [found.zeros, found.target, found.skipped, found.skip_target, found.bits] == expected
    assert found.has_zeros == (zeros is not None)


def test_zeros_are_worth_a_word_when_they_are_asked_for_or_can_be_seen(kinds):
    change = kinds["pruned"].candidates[0].changes[0]
    assert not Totals.of([replace(change, zeros=0.0004, target=None)]).has_zeros
    assert Totals.of([replace(change, zeros=0.0005, target=None)]).has_zeros
    assert Totals.of([replace(change, zeros=0.0, target=0.5)]).has_zeros  # asked for, and not reached
    assert not Totals.of([replace(change, zeros=0.0, target=0.0)]).has_zeros


def test_a_projection_left_dense_by_a_stage_of_zeros_counts_where_one_of_another_kind_does_not(kinds):
    """4 x 4 at 0.5 and 4 x 8 left dense: 8 zeros of 48; a threshold on a third projection changes nothing of that."""
    pruned, skipping = kinds["pruned"].candidates[0].changes, kinds["skipping"].candidates[0].changes
    found = Totals.of((pruned[0], replace(pruned[3], zeros=0.0, target=0.0), skipping[1]))
    assert found.zeros == pytest.approx(8 / 48)
    assert found.target == pytest.approx(8 / 48)
    assert [len(found.zeroed), len(found.outcomes)] == [2, 3]


@pytest.mark.parametrize(
    ("kind", "expected"), [("pruned", True), ("cut", False), ("skipping", False), ("healed", False)]
)
def test_a_target_is_one_of_zeros_only_where_nothing_else_was_the_aim(kinds, kind, expected):
    assert {asks_for_zeros(change) for change in kinds[kind].candidates[0].changes} == {expected}


def test_what_a_token_does_without(kinds):
    """Of 400: half of 224; 48 cut; (16 x .35 + 64 x .4 + 32 x .45) x 2; and all three, where 52.4 stay."""
    spared = {kind: totals(kinds, kind).spared(400) for kind in kinds}
    assert spared == {
        "pruned": 112 / 400,
        "cut": 48 / 400,
        "skipping": pytest.approx(91.2 / 400),
        "quantised": 0,
        "healed": 0,
        "nothing": 0,
        "all": pytest.approx((224 - 2 * (5.2 + 7.2 + 7.2 + 6.6)) / 400),
    }


def test_nothing_is_divided_by_zero(kinds):
    gone = replace(kinds["cut"].candidates[0].changes[0], shape_after=(0, 0), skipped=0.5)
    found = Totals.of([gone])
    assert (found.zeros, found.skipped, found.skip_target) == (None, None, None)
    assert found.outcomes[0].left == 0
    assert Totals.of([replace(gone, shape_before=(0, 0))]).outcomes[0].left == 1
    assert (Totals.of([]).zeros, Totals.of([]).spared(0)) == (None, 0)


def test_means_are_weighted_and_leave_out_what_is_not_there():
    assert mean([(0.2, 10), (0.6, 30)]) == 0.5
    assert mean([(0.2, 0)]) is None
    cells = [((0, "q"), 0.2, 10), ((0, "q"), 0.6, 30), ((0, "k"), None, 5), ((1, "q"), math.nan, 5), ((1, "k"), 0.1, 0)]
    assert mean_by_cell(cells) == {(0, "q"): 0.5}
