import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from forked import in_ranks

from sparity.errors import InvalidInput, SparityError
from sparity.processes.group import ALONE
from sparity.processes.ranks import JOINING, PATIENCE, Ranks, joined


def test_alone_there_is_nobody_to_wait_for():
    tensor = torch.arange(3)
    assert (ALONE.rank, ALONE.size, ALONE.first, list(ALONE.peers)) == (0, 1, True, [0])
    assert (ALONE.told(5), ALONE.collected(6), ALONE.first_does(lambda: 7)) == (5, [6], 7)
    assert ALONE.share(tensor, 0) is tensor
    with pytest.raises(ValueError, match="no rank 1"):
        ALONE.send(tensor, 1)


def test_what_is_exchanged_arrives_bit_for_bit():
    def work(group):
        weight = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
        if group.first:
            shared = group.share(weight.T, 0)  # not contiguous
            group.send(weight[:, 1:3], 2)
            got = None
        else:
            shared = group.share(torch.empty(4, 3, dtype=torch.bfloat16), 0)
            got = group.receive(torch.empty(3, 2, dtype=torch.bfloat16), 0) if group.rank == 2 else None
        group.wait()
        first = group.first_does(lambda: {"by": group.rank})
        return shared, got, group.told(group.rank + 10), group.collected(group.rank), first

    expected = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    for rank, (shared, got, told, collected, first) in enumerate(in_ranks(3, work)):
        assert torch.equal(shared, expected.T)
        assert (got is not None) == (rank == 2)
        assert got is None or torch.equal(got, expected[:, 1:3])
        assert (told, collected, first) == (10, [0, 1, 2], {"by": 0})


@pytest.mark.parametrize("waits", ["wait", "first_does"])
def test_an_error_on_one_rank_stops_all_with_its_message(waits):
    failing = 2 if waits == "wait" else 0

    def work(group):
        if group.rank == failing:
            raise InvalidInput("the third block is bad")
        return group.wait() if waits == "wait" else group.first_does(lambda: None)

    found = in_ranks(3, work)
    assert str(found[failing]) == "the third block is bad"
    for rank in {0, 1, 2} - {failing}:
        assert isinstance(found[rank], SparityError)
        assert str(found[rank]) == f"rank {failing} stopped: the third block is bad"


@pytest.mark.parametrize("killed", [1, 0])
def test_a_rank_that_is_killed_is_noticed(killed):
    def work(group):
        group.wait()
        if group.rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        group.first_does(lambda: None)
        group.wait()

    found = in_ranks(2, work)
    assert found[killed] is None
    assert f"rank {1 - killed} lost another one" in str(found[1 - killed])
    assert "--resume" in str(found[1 - killed])


def test_a_rank_that_does_not_answer_is_not_waited_for_long_but_rank_0s_own_work_is(monkeypatch):
    monkeypatch.setenv(PATIENCE, "1")

    def work(group):
        group.first_does(lambda: time.sleep(2))
        if group.rank == 1:
            time.sleep(3)
        group.wait()

    first, _ = in_ranks(2, work)
    assert "rank 0 lost another one, which was killed or did not answer" in str(first)


def test_a_rank_that_does_not_come_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(JOINING, "0.2")
    with pytest.raises(SparityError, match=r"rank 1, 2 of 3 did not come within 0.2 seconds"):
        Ranks(dist.FileStore(str(tmp_path / "store"), 3), 0, 3)


def test_two_processes_of_one_rank_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(JOINING, "0.1")
    store = dist.FileStore(str(tmp_path / "store"), 3)
    with pytest.raises(SparityError):
        Ranks(store, 1, 3)
    with pytest.raises(InvalidInput, match="two processes say that they are rank 1 of 3"):
        Ranks(store, 1, 3)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no whole number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1' is no whole number"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "without MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1", JOINING: "soon"}, "give seconds"),
    ],
)
def test_an_environment_that_names_no_group_is_refused(monkeypatch, environment, message):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match=message), joined():
        pass


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    with joined() as group:
        assert group is ALONE
