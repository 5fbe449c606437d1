"""Timing with a clock that is told what to say."""

from itertools import cycle

import pytest

from sparity.engine.kernels import timing
from sparity.engine.kernels.timing import measure


class Machine:
    """A clock that moves only within calls, and what threads waited for a core."""

    def __init__(self, monkeypatch):
        self.now, self.waited, self.order = 0.0, 0.0, []
        monkeypatch.setattr(timing, "SWEPT", 8)
        monkeypatch.setattr(timing, "_waited", lambda: self.waited)

    def call(self, name, milliseconds, waits=(0.0,)):
        """A call that takes these times, and waits so long, in turn and over and over."""
        taken, waited = cycle(milliseconds), cycle(waits)

        def run():
            self.order.append(name)
            self.now += next(taken) * 1e-3
            self.waited += next(waited) * 1e-3

        return run

    def measure(self, **calls):
        return measure(calls, lambda: self.now)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_the_lower_quartile_of_calls_that_take_turns(machine):
    times = [9.0, 1.03, 1.0, 7.0, 1.01, 5.0, 1.02, 7.0, 8.0, 1.04]  # the first warms up
    found = machine.measure(a=machine.call("a", times), b=machine.call("b", [2.0]))
    assert found == pytest.approx({"a": 1.02e-3, "b": 2e-3})  # the third of nine
    assert "".join(machine.order) == "ab" + "abba" * 4 + "ab"


def test_calls_that_waited_for_a_core_do_not_count(machine):
    milliseconds, waits = [8.0, 0.5, 1.0, 0.5], [0.0, 0.011, 0.019, 0.4]  # 2 % of 0.5 ms is 0.01 ms
    assert machine.measure(a=machine.call("a", milliseconds, waits)) == pytest.approx({"a": 1e-3})


def test_times_that_do_not_repeat_are_none(machine):
    rising = [1.0 + 0.5 * number for number in range(10_000)]
    assert machine.measure(a=machine.call("a", rising)) is None
    assert 1.0 < machine.now < 1.1  # it gave up in time


def test_long_calls_are_no_sign_of_a_busy_machine(machine):
    found = machine.measure(a=machine.call("a", [200.0]), b=machine.call("b", [50.0]))
    assert found == pytest.approx({"a": 0.2, "b": 0.05})
    machine.order.clear()
    assert machine.measure(a=machine.call("a", [200.0 + 100 * number for number in range(30)])) is None
    assert len(machine.order) == 1 + 18


def test_what_the_system_tells_is_read():
    assert timing._waited() >= 0.0
