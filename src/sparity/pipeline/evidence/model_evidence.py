"""What a stage may ask about the whole model before it decides."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from sparity.calibration import walk
from sparity.calibration.evidence import BlockEvidence, LiveIndependent, Stored, no_evidence
from sparity.calibration.statistics import GRADIENTS, REGIONAL
from sparity.calibration.store import StatisticsStore
from sparity.models import Block
from sparity.pipeline.evidence.opened import NO_INPUTS, Opened
from sparity.pipeline.run.pass_folder import PassFolder
from sparity.pipeline.run.progress import Progress
from sparity.stages import Stage
from sparity.stages.trials import Trials
from sparity.stages.tried import Tried


def stored_evidence(store: StatisticsStore, needs: frozenset[str]) -> Stored:
    """What a store tells of a block, gradients of the loss and of the block's output among it."""
    of_loss = needs & frozenset(GRADIENTS)

    def gradients(block: Block) -> Any:
        return store.gradients(block, of_loss) if of_loss else {}

    return Stored(needs - of_loss, gradients, store=store)


class PassEvidence(Tried):
    """Of the model that a pass opens: its statistics block by block, and how it does with some decision."""

    def __init__(
        self, opened: Opened, stage: Stage, folder: PassFolder, store: StatisticsStore | None, progress: Progress
    ) -> None:
        super().__init__()
        self._opened, self._stage, self._folder = opened, stage, folder
        self._store, self._progress = store, progress
        self._needs = stage.needs()

    def blocks(self) -> Iterator[BlockEvidence]:
        """See `ModelEvidence.blocks`."""
        decoder, needs = self._opened.decoder, self._needs.decision
        stored = self._store is not None and needs <= self._store.needs
        inputs = NO_INPUTS
        if needs and not stored:
            inputs, _, _ = self._opened.inputs(self._folder, REGIONAL in needs)
        carry = bool(needs) and not stored
        for visit in walk(decoder, inputs, carry=carry, group=self._opened.group):
            if not needs:
                yield no_evidence(visit.block)
            elif stored and self._store is not None:
                yield stored_evidence(self._store, needs).read(visit.block)
            else:
                yield LiveIndependent(needs).for_block(visit)

    def _begin(self) -> Trials:
        assert self._opened.tokens is not None, "a stage that tries decisions needs calibration tokens"
        self._progress.phase("measuring what sparsity costs")
        tokens = self._opened.tokens[: self._needs.trials]
        known = (
            None if self._store is None else partial(_read, self._store, self._needs.statistics | self._needs.gradients)
        )
        return Trials(self._opened.decoder, self._stage, self._folder, tokens, self._opened.batch, known)


def _read(store: StatisticsStore, needs: frozenset[str], block: Block) -> BlockEvidence:
    return stored_evidence(store, needs).read(block)
