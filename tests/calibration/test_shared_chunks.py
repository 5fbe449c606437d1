import pytest
import torch
from forked import in_ranks
from hypothesis import given
from hypothesis import strategies as st

from sparity import registry
from sparity.calibration import chunks as chunking
from sparity.calibration import walk
from sparity.calibration.chunks import MOST, RunningSum, chunks, chunks_of, owners_of, rounds
from sparity.calibration.input_statistics.base import statistic
from sparity.models import Decoder
from sparity.processes.group import ALONE, Group

SHAPES = st.tuples(st.integers(0, 300), st.integers(1, 4096))
ALL = frozenset(registry.names("statistic"))


def member(rank, size):
    """A rank that exchanges nothing."""
    group = Group()
    group.rank, group.size = rank, size
    return group


@given(SHAPES, st.integers(1, 9))
def test_chunks_are_whole_batches_and_hold_every_sequence_once(shape, batch):
    found = chunks(shape, batch)
    assert [i for chunk in found for i in range(chunk.start, chunk.stop)] == list(range(shape[0]))
    assert len(found) <= MOST
    assert all(chunk.start % batch == 0 for chunk in found)
    sizes = {chunk.stop - chunk.start for chunk in found[:-1]}
    assert len(sizes) <= 1
    assert all(size * shape[1] >= chunking.FEWEST for size in sizes)


@given(SHAPES, st.integers(1, 9), st.integers(1, 5))
def test_ranks_go_through_the_chunks_in_rounds(shape, batch, size):
    by_rank = [list(rounds(member(rank, size), shape, batch)) for rank in range(size)]
    assert len({len(found) for found in by_rank}) == 1
    in_order = [chunk for turn in zip(*by_rank, strict=True) for chunk in turn if chunk is not None]
    assert in_order == chunks(shape, batch)
    for rank in range(size):
        mine = chunks_of(member(rank, size), shape, batch)
        assert [chunk for chunk in by_rank[rank] if chunk is not None] == mine


def test_chunks_by_hand():
    assert chunks((128, 2048), 1) == [slice(8 * i, 8 * i + 8) for i in range(16)]
    assert chunks((5, 1024), 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert chunks((100, 10), 1) == [slice(0, 100)]  # too few tokens to share


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_running_sum_is_that_of_all_inputs(name):
    counted = statistic(name)
    parts = torch.randn(6, 40, 12, generator=torch.Generator().manual_seed(0))
    running, whole = RunningSum(counted, 12), counted.empty(12, "cpu")
    for part in parts:
        total = counted.empty(12, "cpu")
        counted.add(total, part)
        running.add(dict(counted.stored(total)))
        counted.add(whole, part)
    found = running.total()
    assert found.dtype == whole.dtype
    if name == "inputs":  # in no order that means anything
        assert torch.equal(found[:-1].sort(0).values, whole[:-1].sort(0).values)
    else:
        torch.testing.assert_close(found.triu(), whole.triu()) if name == "gram" else torch.testing.assert_close(
            found, whole
        )


def test_sums_over_chunks_are_added_in_float64():
    running = RunningSum(statistic("mean"), 2)
    for part in ([2.0**24, 0.0], [1.0, 0.0], [1.0, 3.0]):  # in float32 each 1 would be lost
        running.add({"": torch.tensor(part)})
    assert running.total().tolist() == [2.0**24 + 2, 3.0]


def test_no_owner_has_much_more_to_do_than_another(family_models):
    sites = Decoder.open(family_models["llama"]).sites(0)
    owners = owners_of(sites, 2)
    work = {s.name: sum(p.weight.numel() for p in s.projections) * s.projections[0].weight.shape[1] for s in sites}
    loads = [sum(work[name] for name, owner in owners.items() if owner == rank) for rank in (0, 1)]
    assert max(loads) - min(loads) <= max(work.values())
    assert set(owners_of(sites, 1).values()) == {0}


@pytest.mark.parametrize("apart", [False, True])
def test_ranks_find_the_statistics_that_one_process_finds(family_models, monkeypatch, apart):
    monkeypatch.setattr(chunking, "FEWEST", 1)
    tokens = torch.arange(7 * 20).reshape(7, 20) % 97
    decoder = Decoder.open(family_models["qwen3_moe"])

    def work(group):
        found = {}
        inputs = decoder.inputs(tokens, 2)
        for visit in walk(decoder, inputs, group=group):
            for site, statistics in visit.gather(visit.block.sites, ALL, apart=apart):
                found[site.name] = (statistics.sequences, statistics.tokens, statistics.sums)
            if apart:
                for projection in visit.block.projections:  # what rank 0 has is what all have
                    assert torch.equal(group.share(projection.weight, 0), projection.weight)
        return found

    alone = work(ALONE)
    for size in (2, 3):
        found = in_ranks(size, work)
        if apart:
            assert sum(len(mine) for mine in found) == len(alone)
            found = [{name: entry for mine in found for name, entry in mine.items()}]
        for mine in found:
            assert mine.keys() == alone.keys()
            for name, (sequences, seen, sums) in mine.items():
                assert (sequences, seen) == alone[name][:2]
                assert sums.keys() == alone[name][2].keys()
                assert all(torch.equal(total, alone[name][2][key]) for key, total in sums.items())
