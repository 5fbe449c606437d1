"""Walk through a model block by block, the hidden states carried along."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from sparity.calibration.chunks import ChunkSums, Owners, chunks_of, owners_of, rounds
from sparity.calibration.gram_slices import GramFiles
from sparity.calibration.statistics import Statistics
from sparity.errors import InvalidInput
from sparity.memory import give_back
from sparity.models import Block, BlockInputs, Decoder, InputSite
from sparity.processes.group import ALONE, Group

Room = Callable[[int], Tensor]
Gathered = Iterator[tuple[InputSite, Statistics]]


@dataclass
class Visit:
    """One block on the walk: its inputs, and after `finish` its outputs.

    `hidden` holds the block's inputs until `finish`; from then on it is `outputs`, the inputs of the next block, which
    may be the same memory. `block` may be replaced by what an edit made of it. With `files` Gram matrices are summed by
    slices and lie there.
    """

    block: Block
    inputs: BlockInputs
    hidden: Tensor  # [samples, tokens, hidden]
    outputs: Tensor  # of the same shape
    group: Group = ALONE
    files: GramFiles | None = None
    _outputs_ready: bool = False

    def gather(
        self, sites: Collection[InputSite], needs: frozenset[str], keep_outputs: bool = False, apart: bool = False
    ) -> Gathered:
        """Each input site with its statistics, from one forward pass through the block as it is now.

        With `keep_outputs` the outputs of that pass are the next block's inputs, whatever is edited afterwards. With
        `apart` every rank is given the sites that it owns, see `shared_out`; else all ranks are given all of them.
        """
        watched = tuple(sites)
        owners = owners_of(self.block.sites, self.group.size)
        in_files, needs = self._in_files(watched, needs)
        found = {site.name: Statistics.gather(site.name, needs) for site in watched}
        if needs or keep_outputs:
            sums = ChunkSums(watched, needs, self.group, owners)
            for chunk in rounds(self.group, self.hidden.shape, self.inputs.batch):
                sums.add({} if chunk is None else self._of_chunk(chunk, watched, needs, keep_outputs))
            # every site counts all sequences, also where experts share the tokens
            found = sums.statistics(len(self.hidden), everywhere=not apart)
            self._outputs_ready |= keep_outputs
        found = {name: self._together(statistics, in_files.get(name)) for name, statistics in found.items()}
        give_back()
        gathered = ((site, found.pop(site.name)) for site in watched)
        yield from shared_out(gathered, owners, self.group) if apart else gathered

    def _in_files(
        self, sites: tuple[InputSite, ...], needs: frozenset[str]
    ) -> tuple[dict[str, tuple[Tensor, int]], frozenset[str]]:
        """By site the Gram matrix that lies in a file, with the number of tokens; what is left to gather."""
        if self.files is None or "gram" not in needs:
            return {}, needs
        chunks = chunks_of(self.group, self.hidden.shape, self.inputs.batch)

        def run(chunk: slice) -> None:
            self.block.run(self.inputs, self.hidden[chunk])

        return self.files.gather(sites, chunks, run), needs - {"gram"}

    def _together(self, statistics: Statistics, in_file: tuple[Tensor, int] | None) -> Statistics:
        """The statistics of a site with its Gram matrix."""
        if in_file is None or self.files is None:
            return statistics
        total, tokens = in_file
        return replace(
            statistics,
            needs=statistics.needs | {"gram"},
            sequences=len(self.hidden),
            tokens=tokens,
            sums={**statistics.sums, **({"gram": total} if tokens else {})},
            room=self.files.matrix,
        )

    def _of_chunk(
        self, chunk: slice, sites: Collection[InputSite], needs: frozenset[str], keep_outputs: bool
    ) -> dict[str, Statistics]:
        """By site, the statistics of a chunk of the sequences."""
        found = {site.name: Statistics.gather(site.name, needs) for site in sites}
        with ExitStack() as watching:
            for site in sites if needs else ():
                watching.enter_context(site.watch(partial(found[site.name].add, sequences=0)))
            self.block.run(self.inputs, self.hidden[chunk], self.outputs[chunk] if keep_outputs else None)
        return found

    def rerun(self, tokens: int) -> None:
        """Run the block as it is now on its first sequences, of so many tokens or more where there are as many.

        Raises:
            InvalidInput: the inputs are gone, since the outputs took their place.
        """
        if self._outputs_ready and self.outputs is self.hidden:
            raise InvalidInput(f"{self.block.name}: its inputs are gone: ask for them before its outputs are kept")
        batch, length = self.inputs.batch, self.hidden.shape[1]
        self.block.run(self.inputs, self.hidden[: -(-tokens // (batch * length)) * batch])

    def finish(self) -> None:
        """Turn `hidden` into the next block's inputs: the outputs of the block as it is now, or those kept."""
        if not self._outputs_ready:
            for chunk in chunks_of(self.group, self.hidden.shape, self.inputs.batch):
                self.block.run(self.inputs, self.hidden[chunk], into=self.outputs[chunk])
            self._outputs_ready = True
        self.hidden = self.outputs


def shared_out(gathered: Gathered, owners: Owners, group: Group) -> Gathered:
    """The sites that this rank owns; when the caller is through with them all ranks have the weights of all sites."""
    passed = []
    for site, statistics in gathered:
        passed.append(site)
        if owners[site.name] == group.rank:
            yield site, statistics
    for projection, owner in ((p, owners[site.name]) for site in passed for p in site.projections):
        if group.size > 1:
            projection.write(group.share(projection.weight, owner))


def walk(
    decoder: Decoder,
    inputs: BlockInputs,
    *,
    start: int = 0,
    hidden: Tensor | None = None,
    room: Room | None = None,
    carry: bool = True,
    group: Group = ALONE,
    files: GramFiles | None = None,
) -> Iterator[Visit]:
    """One visit per block: loaded, handed over, run again unless the visitor did so, released.

    Args:
        decoder: the model.
        inputs: what `decoder.inputs` recorded for the calibration tokens.
        start: the first block, with `hidden` as its inputs, when a run is resumed.
        hidden: hidden states [samples, tokens, hidden]; the embedding's output by default. Changed in place unless
            there is `room`.
        room: gives the memory for the inputs of a block by its number, at least two taking turns.
        carry: whether hidden states are carried from block to block; without it no block is run.
        group: the ranks that share the calibration sequences; each carries only its own.
        files: where Gram matrices lie that memory has no room for; for a process of its own only.
    """
    current = inputs.hidden if hidden is None else hidden
    for index in range(start, len(decoder)):
        with decoder.block(index) as block:
            give_back()
            outputs = room(index + 1) if room is not None and carry else current
            visit = Visit(block, inputs, current, outputs, group, files)
            yield visit
            if carry:
                visit.finish()
            current = visit.hidden
