"""The hidden states of a walk, in files of the folder that the walk fills."""

from dataclasses import replace

import torch
from torch import Tensor

from sparity.calibration.walk import Room
from sparity.models import BlockInputs
from sparity.pipeline.run.job import Job
from sparity.pipeline.run.run_folder import RunFolder


def block_inputs(job: Job, folder: RunFolder, regional: bool = False) -> tuple[BlockInputs, Tensor | None, Room]:
    """What `walk` wants: the inputs of the blocks, the hidden states that were committed last, and room for more.

    The inputs are empty when the job has no calibration tokens. With `regional` the blocks can be run one sequence at a
    time, whatever the batch.
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
    inputs = decoder.inputs(tokens, batch, spare)
    if regional and batch > 1:  # gradients of a block's output are those of single sequences
        single = decoder.inputs(tokens[:1], 1)
        inputs = replace(inputs, arguments={**inputs.arguments, **single.arguments})
    return inputs, folder.hidden(shape, decoder.dtype), room
