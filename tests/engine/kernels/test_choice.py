"""The choice by hand: who wins, why the others lost, and what is remembered for how long."""

import json
import logging

import pytest

from sparity.engine.kernels import choice, choice_file
from sparity.engine.kernels.choice import Case, KernelCandidate, choose, default_timer, density_step, judge
from sparity.errors import InvalidInput

CASE = Case(4096, 4096, "bitmask", "bfloat16", 50, 1, 2)
OFFERED = {"gemv": None, "prefill": None, "pytorch": "unpacks"}


class Clock:
    """Gives the times that it is told, and counts how often it is asked."""

    def __init__(self, **times):
        self.times, self.asked = times, 0

    def __call__(self, calls):
        self.asked += 1
        for call in calls.values():
            call()
        return {name: self.times[name] for name in calls} if self.times else None


def pick(timer, case=CASE, offered=OFFERED, **arguments):
    return choose(
        case,
        offered,
        lambda names: {name: lambda: None for name in names},
        timer=timer,
        **{"rule": "gemv", **arguments},
    )


def forget(monkeypatch):
    """As a new process would begin."""
    monkeypatch.setattr(choice_file, "_known", {})


# ---- judging


def test_the_fastest_wins_and_the_others_are_told_why():
    found = judge({"gemv": 2e-4, "prefill": 1e-4}, OFFERED, "gemv")
    assert found.winner == "prefill"
    assert found.timed
    assert found.candidates == (
        KernelCandidate("gemv", 2e-4, "2.00x the time"),
        KernelCandidate("prefill", 1e-4, None),
        KernelCandidate("pytorch", None, "unpacks"),
    )


@pytest.mark.parametrize(
    ("rival", "winner"), [(0.98, "gemv"), (1 / 1.029, "gemv"), (1 / 1.031, "prefill"), (1.5, "gemv")]
)
def test_the_favourite_keeps_its_place_within_the_margin(rival, winner):
    assert judge({"gemv": 1.0, "prefill": rival}, OFFERED, "gemv").winner == winner


def test_why_a_faster_candidate_lost():
    found = judge({"gemv": 1.02, "prefill": 1.0}, OFFERED, "gemv")
    assert found.candidates[1] == KernelCandidate("prefill", 1.0, "faster by 2.0%: less than 3% may be noise")


@pytest.mark.parametrize(
    ("kept", "step"), [(0, 0), (2, 0), (3, 5), (50, 50), (52, 50), (53, 55), (99, 100), (100, 100)]
)
def test_density_steps(kept, step):
    assert density_step(kept, 100) == step


def test_the_bytes_of_a_case():
    assert CASE.nbytes == 4096 * 4096 // 2 * 2
    assert CASE._replace(bits=8).nbytes == 4096 * 4096 // 2


# ---- what is timed, and what is not


def test_timed_once_and_read_again_by_a_later_process(cache, monkeypatch):
    first = pick(Clock(gemv=3e-4, prefill=1e-4))
    assert first.winner == "prefill"
    silent = Clock(gemv=1e-9, prefill=1.0)
    assert pick(silent) == first
    forget(monkeypatch)
    assert pick(silent) == first
    assert silent.asked == 0
    (machine,) = json.loads(cache.read_text())["machines"].values()
    assert machine == {
        CASE.key: {
            "winner": "prefill",
            "seconds": {"gemv": 3e-4, "prefill": 1e-4},
            "lost": {"gemv": "3.00x the time", "pytorch": "unpacks"},
        }
    }


@pytest.mark.parametrize(
    "change", [{"rows": 4100}, {"format": "dense"}, {"values": "int8"}, {"density": 55}, {"batch": 4}, {"threads": 1}]
)
def test_another_case_is_timed_anew(cache, change):
    clock = Clock(gemv=1.0, prefill=2.0)
    pick(clock)
    pick(clock, CASE._replace(**change))
    assert clock.asked == 2


def test_other_candidates_are_timed_anew(cache):
    clock = Clock(gemv=1.0, prefill=2.0, pytorch=0.5)
    assert pick(clock).winner == "gemv"
    assert pick(clock, offered={**OFFERED, "pytorch": None}).winner == "pytorch"
    assert clock.asked == 2


@pytest.mark.parametrize("part", ["processor_name", "__version__", "instruction_set", "library", "torch"])
def test_another_machine_or_version_is_timed_anew(cache, monkeypatch, part):
    clock = Clock(gemv=1.0, prefill=2.0)
    monkeypatch.setattr(choice_file.native, "unavailable", lambda: None)
    monkeypatch.setattr(choice_file.native, "instruction_set", lambda: "avx9")
    monkeypatch.setattr(choice_file, "_library_hash", lambda: "0123")
    pick(clock)
    if part == "instruction_set":
        monkeypatch.setattr(choice_file.native, "instruction_set", lambda: "avx10")
    elif part == "library":
        monkeypatch.setattr(choice_file, "_library_hash", lambda: "4567")
    elif part == "torch":
        monkeypatch.setattr(choice_file.torch, "__version__", "99")
    else:
        monkeypatch.setattr(choice_file, part, (lambda: "another") if part == "processor_name" else "99")
    pick(clock)
    assert clock.asked == 2
    assert len(json.loads(cache.read_text())["machines"]) == 2  # the other machine's stays


def test_small_weights_and_rules_time_nothing(cache):
    clock = Clock(gemv=2.0, prefill=1.0)
    small = pick(clock, CASE._replace(rows=100))
    assert small.winner == "gemv"
    assert small.how == "not timed: too small, a call takes about 20 us or less"
    ruled = pick(None)
    assert ruled.how == "not timed: SPARITY_CHOICE=rules"
    assert ruled.candidates == (
        KernelCandidate("gemv", None, None),
        KernelCandidate("prefill", None, "not the rule's"),
        KernelCandidate("pytorch", None, "unpacks"),
    )
    assert pick(None, offered={"gemv": "absent", "prefill": None, "pytorch": None}).winner == "prefill"
    alone = pick(clock, offered={"gemv": None, "pytorch": "unpacks"})
    assert alone.how == "the only candidate"
    assert clock.asked == 0
    assert not cache.exists()


def test_where_nothing_can_run_every_reason_is_said():
    with pytest.raises(InvalidInput, match=r"nothing can run it \(gemv: too old; prefill: too new\)"):
        pick(None, offered={"gemv": "too old", "prefill": "too new"})


def test_a_busy_machine_is_asked_once_and_nothing_is_kept_on_disk(cache, monkeypatch):
    busy = Clock()
    for _ in range(3):
        found = pick(busy)
        assert found.winner == "gemv"
        assert found.how == "not timed: the machine is too busy, times do not repeat"
    assert busy.asked == 1
    pick(Clock(gemv=1.0, prefill=2.0), CASE._replace(batch=4))
    forget(monkeypatch)
    assert pick(Clock(gemv=2.0, prefill=1.0)).winner == "prefill"


def test_the_environment_turns_the_clock_off(monkeypatch):
    monkeypatch.setenv("SPARITY_CHOICE", "rules")
    assert default_timer() is None
    for asked in ("timed", ""):
        monkeypatch.setenv("SPARITY_CHOICE", asked)
        assert default_timer() is choice.measure
    monkeypatch.setenv("SPARITY_CHOICE", "rule")
    with pytest.raises(InvalidInput, match="SPARITY_CHOICE: timed or rules, not 'rule'"):
        default_timer()


# ---- the file


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": 2, "machines": {}}', '{"format": 1}', '{"format": 1, "machines": [1]}', b"\xff\xfe\x00"],
)
def test_a_file_that_makes_no_sense_is_said_once_and_replaced(cache, monkeypatch, caplog, content):
    cache.parent.mkdir()
    cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING):
        for batch in (1, 4):
            assert pick(Clock(gemv=1.0, prefill=2.0), CASE._replace(batch=batch)).winner == "gemv"
    assert [record.message.startswith("kernel timings are measured again: ") for record in caplog.records] == [True]
    forget(monkeypatch)
    silent = Clock(gemv=1.0, prefill=2.0)
    pick(silent)
    assert silent.asked == 0


@pytest.mark.parametrize(
    "entry", [{}, [], {"seconds": {}}, {"seconds": {"gemv": "1"}}, {"seconds": {"gemv": -1.0, "prefill": 1.0}}]
)
def test_an_entry_that_makes_no_sense_is_timed_again(cache, monkeypatch, entry):
    pick(Clock(gemv=1.0, prefill=2.0))
    content = json.loads(cache.read_text())
    content["machines"][choice_file.machine()][CASE.key] = entry
    cache.write_text(json.dumps(content))
    forget(monkeypatch)
    assert pick(Clock(gemv=2.0, prefill=1.0)).winner == "prefill"


def test_what_another_process_wrote_meanwhile_stays(cache, monkeypatch):
    pick(Clock(gemv=1.0, prefill=2.0))
    before = dict(choice_file._known)
    forget(monkeypatch)
    pick(Clock(gemv=1.0, prefill=2.0), CASE._replace(batch=4))
    monkeypatch.setattr(choice_file, "_known", before)
    pick(Clock(gemv=1.0, prefill=2.0), CASE._replace(batch=16))
    (machine,) = json.loads(cache.read_text())["machines"].values()
    assert sorted(machine) == sorted(CASE._replace(batch=batch).key for batch in (1, 4, 16))


def test_a_place_that_cannot_be_written_is_said_once(cache, caplog):
    cache.parent.write_text("a file is in the way")
    with caplog.at_level(logging.WARNING):
        for batch in (1, 4):
            clock = Clock(gemv=2.0, prefill=1.0)
            assert pick(clock, CASE._replace(batch=batch)).winner == "prefill"
            assert pick(clock, CASE._replace(batch=batch)).winner == "prefill"
            assert clock.asked == 1
    assert [
        record.message.startswith("kernel timings are kept for this process only: ") for record in caplog.records
    ] == [True]


def test_where_the_file_lies(monkeypatch):
    monkeypatch.setenv("HOME", "/someone")
    monkeypatch.delenv("SPARITY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(choice_file.path()) == "/someone/.cache/sparity/kernels.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "/else")
    assert str(choice_file.path()) == "/else/sparity/kernels.json"
    monkeypatch.setenv("SPARITY_CACHE", "~/mine")
    assert str(choice_file.path()) == "/someone/mine/kernels.json"


def test_timings_hold_for_the_products_that_prompts_are_read_with(monkeypatch):
    own = choice_file.machine()
    monkeypatch.setenv("SPARITY_PRODUCTS", "float32")
    assert choice_file.machine() == f"{own}, float32 products"
