"""Walk through a model block by block, gathering statistics on the way."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from sparity.calibration.statistics import Statistics
from sparity.models import Block, BlockInputs, Decoder, InputSite

Order = Literal["sequential", "independent"]
Known = Callable[[Block, InputSite], Statistics]
Room = Callable[[int], Tensor]


@dataclass
class Step:
    """One block on the walk: its statistics, and afterwards its outputs.

    `hidden` holds the block's inputs until `finish`; from then on it is `outputs`, the inputs of the next block, which
    may be the same memory.
    """

    block: Block
    inputs: BlockInputs
    hidden: Tensor  # [samples, tokens, hidden]
    outputs: Tensor  # of the same shape
    needs: frozenset[str]
    order: Order
    true_sequential: bool
    known: Known | None = None
    _outputs_ready: bool = False

    def sites(self) -> Iterator[tuple[InputSite, Statistics]]:
        """Each input site with its statistics; the caller may change the site's projections before the next.

        With `true_sequential` the statistics of a site are gathered when it is reached, so that they see the changes
        to the sites before it; otherwise all are gathered in one pass over the unchanged block.
        """
        if self.known is not None:
            for site in self.block.sites:
                yield site, self.known(self.block, site)
        elif self.true_sequential:
            for site in self.block.sites:
                yield from self._gather((site,), into=None)
        elif self.order == "independent":  # the dense outputs are the next block's inputs: one pass serves both
            self._outputs_ready = True
            yield from self._gather(self.block.sites, into=self.outputs)
        else:
            yield from self._gather(self.block.sites, into=None)

    def finish(self) -> None:
        """Turn `hidden` into the next block's inputs: the outputs of the block as it is now, or as it was."""
        if self.known is not None:
            return  # nobody reads them
        if not self._outputs_ready:
            self.block.run(self.inputs, self.hidden, into=self.outputs)
            self._outputs_ready = True
        self.hidden = self.outputs

    def _gather(self, sites: Collection[InputSite], into: Tensor | None) -> Iterator[tuple[InputSite, Statistics]]:
        gathered = [(site, Statistics.gather(site.name, self.needs)) for site in sites]
        if self.needs or into is not None:
            with ExitStack() as watching:
                for site, statistics in gathered:
                    if self.needs:
                        watching.enter_context(site.watch(partial(statistics.add, sequences=0)))
                self.block.run(self.inputs, self.hidden, into)
            for _, statistics in gathered:  # every site counts all sequences, also where experts share the tokens
                statistics.sequences += len(self.hidden)
        yield from gathered


def walk(
    decoder: Decoder,
    inputs: BlockInputs,
    needs: Collection[str],
    *,
    order: Order = "sequential",
    true_sequential: bool = False,
    start: int = 0,
    hidden: Tensor | None = None,
    room: Room | None = None,
    known: Known | None = None,
) -> Iterator[Step]:
    """One step per block: loaded, its inputs watched, handed over, run again, released.

    Args:
        decoder: the model.
        inputs: what `decoder.inputs` recorded for the calibration tokens.
        needs: the statistics to gather, names of `STATISTICS`; none means that no forward pass is needed.
        order: "sequential" gathers statistics behind pruned blocks (as the papers do), "independent" on the dense
            model.
        true_sequential: gather a site's statistics behind the pruned sites of its own block; sequential order only.
        start: the first block, with `hidden` as its inputs, when a run is resumed.
        hidden: hidden states [samples, tokens, hidden]; the embedding's output by default. Changed in place unless
            there is `room`.
        room: gives the memory for the inputs of a block by its number, at least two taking turns.
        known: gives the statistics that an earlier walk gathered; there is no forward pass then.
    """
    current = inputs.hidden if hidden is None else hidden
    for index in range(start, len(decoder)):
        with decoder.block(index) as block:
            outputs = current if room is None or known is not None else room(index + 1)
            step = Step(block, inputs, current, outputs, frozenset(needs), order, true_sequential, known)
            yield step
            if needs:
                step.finish()
            current = step.hidden
