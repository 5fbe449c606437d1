"""The hidden states of a walk, in files of the folder that the walk fills."""

import torch
from torch import Tensor

from sparity.calibration.walk import Room
from sparity.models import BlockInputs
from sparity.pipeline.folder import RunFolder
from sparity.pipeline.job import Job


def block_inputs(job: Job, folder: RunFolder) -> tuple[BlockInputs, Tensor | None, Room]:
    """What `walk` wants: the inputs of the blocks, the hidden states that were committed last, and room for more.

    The inputs are empty when the job has no calibration tokens.
    """
    decoder, tokens = job.decoder, job.tokens
    shape = (0, 0, 0) if tokens is None else decoder.hidden_shape(tokens)

    def room(blocks: int) -> Tensor:
        return folder.room(blocks, shape, decoder.dtype)

    if tokens is None:
        return BlockInputs(torch.empty(0), {}, 1), None, room
    done = folder.progress.blocks
    batch = job.recipe.calibration.batch if job.recipe.calibration else 1
    spare = room(done + 1 if done else 0)  # the file that is not committed
    return decoder.inputs(tokens, batch, spare), folder.hidden(shape, decoder.dtype), room
