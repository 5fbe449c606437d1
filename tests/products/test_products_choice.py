"""Whether products are emulated: timed, or told, or settled when a run began."""

import pytest
import torch

from sparity.errors import InvalidInput
from sparity.products import choice
from sparity.products.choice import SIXTEEN_BITS, emulated, emulated_types, settled, words

BOTH = frozenset(SIXTEEN_BITS)


@pytest.fixture
def timed(monkeypatch):
    """Products are timed, and so many times as long as float32 is what is found."""
    monkeypatch.delenv("SPARITY_CHOICE")
    found = {torch.bfloat16: 1.5, torch.float16: 1.49, torch.int8: 12.0}
    monkeypatch.setattr(choice, "slowdown", found.__getitem__)


def test_what_is_slow_is_emulated(timed):
    assert [emulated(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int8)] == [True, False, True]
    assert emulated_types() == {torch.bfloat16}
    assert words(torch.bfloat16) == "float32 (own type: 1.5x the time of float32)"
    assert words(torch.float16) == "own type (1.5x the time of float32)"


def test_the_answer_may_be_told(timed, monkeypatch):
    for told, types in (("float32", BOTH), ("own", frozenset()), ("measured", {torch.bfloat16})):
        monkeypatch.setenv("SPARITY_PRODUCTS", told)
        assert emulated_types() == types
    monkeypatch.setenv("SPARITY_PRODUCTS", "own")
    assert words(torch.bfloat16) == "own type (SPARITY_PRODUCTS=own)"
    monkeypatch.setenv("SPARITY_PRODUCTS", "fast")
    with pytest.raises(InvalidInput, match="SPARITY_PRODUCTS: float32, own or measured, not 'fast'"):
        emulated(torch.bfloat16)


def test_by_the_rules_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(choice, "slowdown", lambda dtype: pytest.fail("timed"))
    assert not any(emulated(dtype) for dtype in (*SIXTEEN_BITS, torch.int8))
    assert words(torch.bfloat16) == "own type (not timed: SPARITY_CHOICE=rules)"
    monkeypatch.setenv("SPARITY_PRODUCTS", "float32")
    assert emulated_types() == BOTH


def test_what_a_run_settled_holds_within_it(timed):
    with settled([torch.float16]):
        assert emulated_types() == {torch.float16}
        assert emulated(torch.int8)  # exact either way
        with settled([]):
            assert emulated_types() == frozenset()
        assert emulated_types() == {torch.float16}
    assert emulated_types() == {torch.bfloat16}


def test_both_sides_of_a_timing_run_on_one_thread(monkeypatch):
    threads = torch.get_num_threads()
    seen, now = [], iter(range(100))
    monkeypatch.setattr(choice.time, "thread_time", lambda: float(next(now)))
    torch.set_num_threads(threads + 1)
    try:
        ratio = choice._ratio(lambda: (next(now), seen.append(torch.get_num_threads())), lambda: seen.append(1))
        assert (ratio, set(seen), torch.get_num_threads()) == (2.0, {1}, threads + 1)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.int8], ids=str)
def test_the_timing_gives_a_ratio(dtype, monkeypatch):
    monkeypatch.setattr(choice, "SHAPE", (4, 32, 32))
    assert choice.slowdown.__wrapped__(dtype) > 0
