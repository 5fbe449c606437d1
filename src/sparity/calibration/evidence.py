"""What a stage is told about a block: statistics of its inputs, gradients of its weights, zeros that must stay.

Where they come from is one of three: `LiveSequential` runs the block after the edits to the blocks before it (the
papers' way), `LiveIndependent` runs the model as it was opened, `Stored` reads what an earlier walk gathered.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from sparity.calibration.chunks import Owners, owners_of
from sparity.calibration.regional import regional_gradients
from sparity.calibration.statistics import REGIONAL, Statistics
from sparity.calibration.walk import Gathered, Visit, shared_out
from sparity.errors import InvalidInput
from sparity.models import Block, InputSite
from sparity.models.block import Projection
from sparity.processes.group import ALONE, Group

Order = Literal["sequential", "independent"]
Gradients = Mapping[str, Mapping[str, Tensor]]  # projection -> gradient statistic -> [out, in]


class Store(Protocol):
    """Statistics that an earlier walk gathered."""

    def read(self, block: Block, site: InputSite) -> Statistics:
        """Those of one input site."""

    def gradients(self, block: Block, needs: Collection[str]) -> Gradients:
        """Those of a block's projections."""


@dataclass(frozen=True)
class Region:
    """A block and the calibration sequences that are sent through it, as often as it is edited.

    Attributes:
        visit: of the block.
        gather: each input site with its statistics, of the block as it is when they are asked for.
        look: the same with all else that is known then, gradients too.
    """

    visit: Visit
    gather: Callable[[], Gathered] = field(repr=False)
    look: Callable[[], "BlockEvidence"] = field(repr=False)

    def __len__(self) -> int:
        return len(self.visit.hidden)

    def sequence(self, place: int) -> Tensor:
        """The inputs `[1, tokens, hidden]` of one sequence, on the block's device."""
        device = next(self.visit.block.module.parameters()).device
        return self.visit.hidden[place : place + 1].to(device)


@dataclass
class BlockEvidence:
    """What is known of one block.

    Attributes:
        block: its weights as they are now.
        gradients: what is known of its projections' gradients.
        masks: projection -> bool `[out, in]`, False where a zero of an earlier stage must stay.
        losses: filled while the sites are passed, where it is given: projection -> the share of its output's energy
            that the edits between one site and the next took away.
        rerun: runs the block as it is now on its first calibration sequences, of so many tokens or more where there are
            as many; None where only statistics are known.
        before: what a run-time stage's fit of the block before left for this one, by name.
        region: the sequences themselves, where blocks are run after the edits to those before; else None.
    """

    block: Block
    gathered: Callable[[], Gathered] = field(repr=False)
    gradients: Gradients = field(default_factory=dict, repr=False)
    masks: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    losses: dict[str, float] | None = None
    rerun: Callable[[int], None] | None = field(default=None, repr=False)
    before: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    region: Region | None = field(default=None, repr=False)

    def sites(self) -> Iterator[tuple[InputSite, Statistics]]:
        """Each input site with its statistics; the caller may change the site's projections before the next."""
        for site, statistics in self.gathered():
            if self.losses is None:
                yield site, statistics
                continue
            before = {projection.name: projection.weight.clone() for projection in site.projections}
            yield site, statistics
            for projection in site.projections:
                self.losses[projection.name] = _lost_energy(before[projection.name], projection.weight, statistics)

    def inputs(self, sites: Collection[InputSite], tokens: int) -> dict[str, Tensor]:
        """Site -> its inputs `[tokens, in]`, float32: of every site the same tokens in the same order, the first ones.

        Raises:
            InvalidInput: only statistics are known, of which each site has its own.
        """
        if self.rerun is None:
            raise InvalidInput(
                f"{self.block.name}: what several places read is to be seen token by token, which statistics cannot "
                "show: choose a budget that does not measure, such as uniform"
            )
        seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        with ExitStack() as watching:
            for site in sites:
                watching.enter_context(site.watch(seen[site.name].append))
            self.rerun(tokens)
        return {name: torch.cat(parts)[:tokens].float() for name, parts in seen.items()}

    def of(self, projection: Projection, statistics: Statistics) -> Statistics:
        """A site's statistics together with one projection's gradients."""
        return statistics.with_gradients(self.gradients.get(projection.name, {}))


def no_evidence(block: Block) -> BlockEvidence:
    """A block of which nothing is known but its weights."""
    return BlockEvidence(block, lambda: ((site, Statistics.gather(site.name, ())) for site in block.sites))


@dataclass(frozen=True)
class Evidence(ABC):
    """Where the statistics `needs`, of `calibration.statistics`, come from.

    `gradients` gives what is known of the gradients of the loss for a block.
    """

    needs: frozenset[str]
    gradients: Callable[[Block], Gradients] = field(default=lambda block: {}, repr=False)

    @abstractmethod
    def for_block(self, visit: Visit, losses: dict[str, float] | None = None, apart: bool = False) -> BlockEvidence:
        """The evidence of the block that a walk has come to; with `apart` of the sites that this rank owns."""

    def _with_regional(self, visit: Visit) -> Gradients:
        """The gradients of the loss, and those of the block's own output where they are needed."""
        found = {name: dict(parts) for name, parts in self.gradients(visit.block).items()}
        if REGIONAL in self.needs:
            for name, gradient in regional_gradients(visit.block, visit.inputs, visit.hidden).items():
                found.setdefault(name, {})[REGIONAL] = gradient
        return found

    @property
    def _of_inputs(self) -> frozenset[str]:
        return self.needs - {REGIONAL}


@dataclass(frozen=True)
class LiveSequential(Evidence):
    """Statistics after the edits to the blocks before; with `true_sequential` also after those to earlier sites."""

    true_sequential: bool = False

    def for_block(self, visit: Visit, losses: dict[str, float] | None = None, apart: bool = False) -> BlockEvidence:
        """See `Evidence.for_block`."""
        return BlockEvidence(
            visit.block,
            lambda: self._gather(visit, apart),
            self._with_regional(visit),
            losses=losses,
            rerun=visit.rerun,
            region=Region(visit, lambda: self._gather(visit, False), lambda: self.for_block(visit)),
        )

    def _gather(self, visit: Visit, apart: bool) -> Gathered:
        if self.true_sequential:
            for site in visit.block.sites:
                yield from visit.gather((site,), self._of_inputs, apart=apart)
        else:
            yield from visit.gather(visit.block.sites, self._of_inputs, apart=apart)


@dataclass(frozen=True)
class LiveIndependent(Evidence):
    """Statistics of the model as it was opened: the outputs of its blocks are carried on, not those of edited ones."""

    def for_block(self, visit: Visit, losses: dict[str, float] | None = None, apart: bool = False) -> BlockEvidence:
        """See `Evidence.for_block`."""

        def gather() -> Gathered:
            return visit.gather(visit.block.sites, self._of_inputs, keep_outputs=True, apart=apart)

        return BlockEvidence(visit.block, gather, self._with_regional(visit), losses=losses, rerun=visit.rerun)


@dataclass(frozen=True)
class Stored(Evidence):
    """Statistics of the opened model that an earlier walk gathered into a store; no block is run."""

    store: Store = field(kw_only=True, repr=False)

    def for_block(self, visit: Visit, losses: dict[str, float] | None = None, apart: bool = False) -> BlockEvidence:
        """See `Evidence.for_block`."""
        return self.read(visit.block, losses, visit.group if apart else ALONE)

    def read(self, block: Block, losses: dict[str, float] | None = None, group: Group = ALONE) -> BlockEvidence:
        """The evidence of a block without a walk; of a `group` that shares its sites out, of those of this rank."""
        owners = owners_of(block.sites, group.size)

        def gather() -> Gathered:
            return shared_out(((site, self._of(block, site, owners, group)) for site in block.sites), owners, group)

        found = {name: dict(parts) for name, parts in self.gradients(block).items()}
        if REGIONAL in self.needs:
            for name, parts in self.store.gradients(block, {REGIONAL}).items():
                found.setdefault(name, {}).update(parts)
        return BlockEvidence(block, gather, found, losses=losses)

    def _of(self, block: Block, site: InputSite, owners: Owners, group: Group) -> Statistics:
        """What the store has of a site, where it is this rank's."""
        return self.store.read(block, site) if owners[site.name] == group.rank else Statistics.gather(site.name, ())


def _lost_energy(before: Tensor, after: Tensor, statistics: Statistics) -> float:
    """The share of the output's energy on calibration tokens that the change of a weight `[out, in]` takes away."""
    gram = statistics.gram

    def energy(matrix: Tensor) -> float:
        return float(((matrix @ gram) * matrix).sum())

    total = energy(before.float())
    return energy(before.float() - after.float()) / total if total > 0 else 0.0
