"""What a stage may ask about a model in memory before it decides, without the folder of a run."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparity.calibration import Statistics, walk
from sparity.calibration.evidence import BlockEvidence, LiveIndependent, no_evidence
from sparity.errors import InvalidInput
from sparity.models import Block, Decoder
from sparity.stages.base import Stage
from sparity.stages.trials import Trials
from sparity.stages.tried import Tried


class EvidenceInMemory(Tried):
    """The statistics of a model, gathered once and kept in memory, and how it does with some decision.

    Args:
        decoder: the model.
        stage: who asks; it reads no gradients.
        tokens: token ids `[samples, length]`; decisions are tried on the first `needs.trials` samples.
        batch: samples per forward pass.
    """

    def __init__(self, decoder: Decoder, stage: Stage, tokens: Tensor, batch: int = 1) -> None:
        super().__init__()
        self._decoder, self._stage, self._tokens, self._batch = decoder, stage, tokens, batch
        self._needs = stage.needs()
        self._gathered: list[dict[str, Statistics]] = []  # of each block, by site

    def blocks(self) -> Iterator[BlockEvidence]:
        """See `ModelEvidence.blocks`."""
        for index in range(len(self._decoder)):
            with self._decoder.block(index) as block:
                yield self._known(block)

    def _begin(self) -> Trials:
        if self._tokens.shape[1] < 2:
            raise InvalidInput(
                f"token ids {list(self._tokens.shape)}: a budget that measures predicts the next token: give "
                "samples of 2 tokens or more"
            )
        scratch = Scratch(Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="sparity-"))))
        tokens = self._tokens[: self._needs.trials]
        return Trials(self._decoder, self._stage, scratch, tokens, self._batch, self._known)

    def _known(self, block: Block) -> BlockEvidence:
        needs = self._needs.decision
        if not needs:
            return no_evidence(block)
        if not self._gathered:
            evidence = LiveIndependent(needs)
            for visit in walk(self._decoder, self._decoder.inputs(self._tokens, self._batch)):
                found = evidence.for_block(visit).sites()
                self._gathered.append({site.name: statistics for site, statistics in found})
        known: Mapping[str, Statistics] = self._gathered[block.index]
        return BlockEvidence(block, lambda: ((site, known[site.name]) for site in block.sites))


class Scratch:
    """A folder whose notes are kept in memory, for trials that no run resumes."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._notes: dict[str, dict[str, Any]] = {}

    def remember(self, name: str, value: dict[str, Any]) -> None:
        """See `Memory.remember`."""
        self._notes[name] = value

    def recall(self, name: str) -> dict[str, Any] | None:
        """See `Memory.recall`."""
        return self._notes.get(name)
