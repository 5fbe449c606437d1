"""Calibration in chunks of sequences that do not depend on how many processes share them, and sums in their order.

A chunk's own sums are in float32, as each batch gives them. Sums over chunks are added in the order of the chunks, in
float64, by one rank, and rounded once: so they are the same bits whoever computed which chunk.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparity.calibration.input_statistics.base import Statistic, statistic
from sparity.calibration.statistics import Statistics
from sparity.models import InputSite
from sparity.processes.group import Group

MOST = 16  # chunks: so many processes can share the work; each chunk's sums travel to the rank that adds them up
FEWEST = 2048  # tokens of a chunk, where there are as many: adding its sums up must cost little beside computing them
ROWS = 64  # that are added at once

Owners = Mapping[str, int]  # input site -> the rank that adds its sums up
Parts = dict[str, Tensor]  # what is stored of a raw sum, by name


def chunks(shape: Sequence[int], batch: int) -> list[slice]:
    """Runs of the sequences `[samples, tokens, ...]`, of whole batches each: at most 16, and not of a few tokens.

    Of no sequences, whose shape may lack the rest, there are none.
    """
    samples, length = (*shape, 1)[:2]
    size = batch * max(-(-samples // (batch * MOST)), -(-FEWEST // (batch * max(length, 1))), 1)
    return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]


def chunks_of(group: Group, shape: Sequence[int], batch: int) -> list[slice]:
    """Those that this rank works on."""
    return chunks(shape, batch)[group.rank :: group.size]


def rounds(group: Group, shape: Sequence[int], batch: int) -> Iterator[slice | None]:
    """This rank's chunk of each round, in which every rank has one or, at the end, none."""
    mine = chunks_of(group, shape, batch)
    yield from mine
    if len(mine) * group.size < len(chunks(shape, batch)):
        yield None


def owners_of(sites: Sequence[InputSite], size: int) -> Owners:
    """The rank that works on each site's projections, so that no rank has much more to do than another."""
    work = {site.name: sum(p.weight.numel() for p in site.projections) * _width(site) for site in sites}
    loads, found = [0] * size, dict[str, int]()
    for name in sorted(work, key=lambda name: (-work[name], name)):
        found[name] = loads.index(min(loads))
        loads[found[name]] += work[name]
    return found


def _width(site: InputSite) -> int:
    return int(site.projections[0].weight.shape[1])


def add_wide(total: Tensor, part: Tensor) -> None:
    """Add `part` to a `total` of a wider type a few rows at a time: all of it would be copied into that type first."""
    if not total.ndim:
        total.add_(part)
        return
    for start in range(0, len(total), ROWS):
        total[start : start + ROWS].add_(part[start : start + ROWS])


@dataclass
class RunningSum:
    """A statistic's raw sum over chunks that come in their order."""

    counted: Statistic
    columns: int
    _wide: Parts = field(default_factory=dict)
    _total: Tensor | None = None

    def add(self, parts: Parts) -> None:
        """Count what is stored of a chunk's raw sum, which is not kept."""
        if not self.counted.adds_up:
            other = self._restored(parts)
            self._total = other if self._total is None else self.counted.merge(self._total, other)
        elif self._wide:
            for name, total in self._wide.items():
                add_wide(total, parts[name])
        else:
            for name, part in parts.items():
                self._wide[name] = part.to(torch.float64 if part.is_floating_point() else part.dtype, copy=True)

    def total(self) -> Tensor:
        """The raw sum over all chunks; it can be asked for once."""
        if self._total is not None:
            return self._total
        wide, self._wide = self._wide, {}
        return self._restored(wide)

    def _restored(self, parts: Parts) -> Tensor:
        device = next(iter(parts.values())).device
        like = self.counted.empty(self.columns, "meta")
        whole = self.counted.restore(lambda name: parts.pop(name).to(like.dtype), self.columns)
        return whole.to(device, copy=not self.counted.adds_up)


class ChunkSums:
    """The statistics of sites over all chunks.

    Args:
        sites: that are watched.
        needs: the statistics.
        group: the ranks that share the chunks.
        owners: the rank that adds up each site's sums; only there they are complete.
    """

    def __init__(self, sites: Sequence[InputSite], needs: frozenset[str], group: Group, owners: Owners) -> None:
        self._sites, self._needs, self._group, self._owners = sites, needs, group, owners
        self._sums: dict[tuple[str, str], RunningSum] = {}
        self._tokens = dict.fromkeys((site.name for site in sites), 0)

    def add(self, chunk: Mapping[str, Statistics]) -> None:
        """Count this rank's chunk of a round by site, or none; all ranks must call this."""
        counts = self._group.collected({name: found.tokens for name, found in chunk.items()})
        for site in self._sites:
            owner, width = self._owners[site.name], _width(site)
            for name in sorted(self._needs):
                counted = statistic(name)
                for rank in self._group.peers:  # the order of the chunks
                    if not counts[rank].get(site.name):
                        continue
                    key = (site.name, name)
                    if rank == owner == self._group.rank:
                        self._add(key, width, counted.stored(chunk[site.name].sums[name]))
                    elif rank == self._group.rank:
                        for part in counted.stored(chunk[site.name].sums[name]).values():
                            self._group.send(part, owner)
                    elif owner == self._group.rank:
                        self._add(key, width, self._received(counted, site, rank))
            self._tokens[site.name] += sum(count.get(site.name, 0) for count in counts)

    def statistics(self, sequences: int, everywhere: bool) -> dict[str, Statistics]:
        """Those of each site over so many sequences, complete at its owner, or `everywhere` for all ranks."""
        found = {}
        for site in self._sites:
            statistics = found[site.name] = Statistics.gather(site.name, self._needs)
            statistics.sequences, statistics.tokens = sequences, self._tokens[site.name]
            owner = self._owners[site.name]
            for name in sorted(self._needs) if statistics.tokens else ():
                if owner == self._group.rank:
                    statistics.sums[name] = self._sums.pop((site.name, name)).total()
                if everywhere and self._group.size > 1:
                    statistics.sums[name] = self._shared(statistic(name), site, statistics.sums.get(name), owner)
        return found

    def _add(self, key: tuple[str, str], width: int, parts: Parts) -> None:
        self._sums.setdefault(key, RunningSum(statistic(key[1]), width)).add(dict(parts))

    def _received(self, counted: Statistic, site: InputSite, rank: int) -> Parts:
        return {name: self._group.receive(like, rank) for name, like in self._like(counted, site).items()}

    def _shared(self, counted: Statistic, site: InputSite, total: Tensor | None, owner: int) -> Tensor:
        parts = self._like(counted, site) if total is None else counted.stored(total)
        parts = {name: self._group.share(part, owner) for name, part in parts.items()}
        device = next(iter(parts.values())).device
        return total if total is not None else counted.restore(parts.__getitem__, _width(site)).to(device)

    def _like(self, counted: Statistic, site: InputSite) -> Parts:
        """Memory for what is stored of a raw sum."""
        device = site.projections[0].weight.device
        stored = counted.stored(counted.empty(_width(site), "meta"))
        return {name: torch.empty(part.shape, dtype=part.dtype, device=device) for name, part in stored.items()}
