"""A model as a pass opens it, and the hidden states of a walk through it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparity.calibration.tokens import token_hash
from sparity.calibration.walk import Room
from sparity.models import BlockInputs, Decoder
from sparity.pipeline.run.pass_folder import PassFolder
from sparity.processes.group import ALONE, Group
from sparity.stages.base import Workload

NO_INPUTS = BlockInputs(torch.empty(0), {}, 1)  # of a walk that carries nothing


@dataclass(frozen=True)
class Opened:
    """A model and what it is calibrated on: token ids `[samples, length]`, `batch` sequences per forward pass.

    The ranks of `group` share the sequences.
    """

    decoder: Decoder
    tokens: Tensor | None
    batch: int = 1
    group: Group = ALONE

    @property
    def workload(self) -> Workload:
        """How much calibration there is."""
        samples, length = (0, 0) if self.tokens is None else self.tokens.shape
        return Workload(int(samples), int(length), self.batch)

    def identity(self) -> dict[str, str | None]:
        """What statistics of the model belong to."""
        return {
            "model": self.decoder.source.fingerprint(),
            "dtype": str(self.decoder.dtype),
            "calibration tokens": None if self.tokens is None else token_hash(self.tokens),
        }

    def inputs(self, folder: PassFolder, regional: bool = False) -> tuple[BlockInputs, Tensor | None, Room]:
        """What `walk` wants: the inputs of the blocks, the hidden states that were committed last, and room for more.

        They lie in files of the folder. The inputs are empty without calibration tokens. With `regional` the blocks can
        be run one sequence at a time, whatever the batch.
        """
        decoder, tokens = self.decoder, self.tokens
        shape = (0, 0, 0) if tokens is None else decoder.hidden_shape(tokens)

        def room(blocks: int) -> Tensor:
            return folder.room(blocks, shape, decoder.dtype)

        if tokens is None:
            return NO_INPUTS, None, room
        done = folder.committed.blocks
        spare = room(done + 1 if done else 0)  # the file that is not committed
        inputs = decoder.inputs(tokens, self.batch, spare)  # every rank writes all of them, the same bits
        self.group.wait()
        if regional and self.batch > 1:  # gradients of a block's output are those of single sequences
            single = decoder.inputs(tokens[:1], 1)
            inputs = replace(inputs, arguments={**inputs.arguments, **single.arguments})
        return inputs, folder.hidden(shape, decoder.dtype), room
