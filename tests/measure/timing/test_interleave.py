from functools import partial

import pytest

from sparity.measure.data.report import Spread
from sparity.measure.timing.interleave import ratios, spread, take_turns


def test_contenders_take_turns_in_an_order_that_reverses_and_the_first_round_does_not_count():
    told = []

    def turn(name):
        told.append(name)
        return len(told)

    results = take_turns([partial(turn, name) for name in "abc"], rounds=2)
    assert "".join(told) == "cba" + "abc" + "cba"
    assert results == [[4, 9], [5, 8], [6, 7]]


def test_median_lowest_and_highest():
    assert spread([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)


def test_ratios_are_taken_round_by_round():
    assert ratios([2.0, 8.0, 9.0], [1.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratios([1.0, 2.0], [1.0])
