"""Gradients of the dense model's loss, block by block from the last to the first.

The loss is the mean cross-entropy of one calibration sequence, so that the squares are those of single sequences. Only
one block is in memory at a time: a forward pass stores every block's inputs on disk, and the way back reads them again.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparity.calibration.output_gradients import check_outputs, summed_output_grams
from sparity.calibration.statistics import OUTPUT_GRAM, WEIGHT_GRADIENTS
from sparity.checkpoints.shards import write_tensors
from sparity.errors import CorruptFile, InvalidInput, NumericalError
from sparity.models import Block, BlockInputs, Decoder, InputSite
from sparity.products.float32 import float32_products

FP32 = 4
MIN_LENGTH = 3
REMEDY = "use a wider dtype (float32) or other text"


@torch.enable_grad()
@float32_products()
def gather_gradients(decoder: Decoder, tokens: Tensor, needs: Collection[str], folder: Path) -> None:
    """Write the gradient statistics of every projection into `folder`, a file per block, for `read_gradients`.

    What an earlier call finished there is not done again; the folder must belong to the same model and tokens. The
    sums are in float32 whatever the decoder's dtype, in which everything else is computed.

    Args:
        decoder: the dense model.
        tokens: `[samples, length]`, no padding, as `check_length` wants them.
        needs: which of `GRADIENTS` to write.
        folder: exists; `gradient_bytes` says how much is needed there.

    Raises:
        InvalidInput: the samples are too short, or outputs of experts are asked for.
        NumericalError: a loss or gradient is NaN or infinite.
        CorruptFile: what an earlier call left in the folder cannot be read.
    """
    check_length(tokens)
    if OUTPUT_GRAM in needs:
        check_outputs(decoder)
    blocks = range(len(decoder))
    if not all(gradient_file(folder, index).exists() for index in blocks):
        _gather(decoder, tokens, needs, folder)
    for index in blocks:  # what a process that was killed while it cleaned up left over
        _input(folder, index).unlink(missing_ok=True)
        _slope(folder, index + 1).unlink(missing_ok=True)


def check_length(tokens: Tensor) -> None:
    """Raise `InvalidInput` when samples `[samples, length]` are too short.

    Of two tokens only the first predicts another, and it attends to itself alone: queries and keys get no gradient.
    """
    if tokens.shape[1] < MIN_LENGTH:
        raise InvalidInput(
            f"gradients need calibration samples of at least {MIN_LENGTH} tokens, got {tokens.shape[1]}: raise "
            "`length` in the calibration section"
        )


def gradient_file(folder: Path, index: int) -> Path:
    """What `gather_gradients` writes for block `index`."""
    return folder / f"gradients-{index}.safetensors"


def read_gradients(path: Path, block: Block, needs: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """Projection -> statistic in float32, on the block's device, from the block's file.

    Raises:
        CorruptFile: the file is missing, truncated or of something else.
    """
    device = next(block.module.parameters()).device
    names = {(p.name, need): f"{need}.{p.name}" for p in block.projections for need in needs}
    stored = _read(path, names.values())
    found: dict[str, dict[str, Tensor]] = {}
    for (projection, need), key in names.items():
        found.setdefault(projection, {})[need] = stored[key].to(device)
    return found


def gradient_bytes(decoder: Decoder, samples: int, length: int, needs: Collection[str]) -> int:
    """The most that `gather_gradients` has on disk: the results, every block's inputs, and two gradients of them."""
    results = sum(statistics_bytes(decoder.sites(index), needs) for index in range(len(decoder)))
    hidden = samples * length * int(decoder.config.hidden_size) * decoder.dtype.itemsize
    return results + (len(decoder) + 2) * hidden if needs else 0


def statistics_bytes(sites: Collection[InputSite], needs: Collection[str]) -> int:
    """What the gradient statistics of the projections of `sites` take."""
    weights = [projection.weight for site in sites for projection in site.projections]
    return FP32 * sum(math.prod(_shape(weight, need)) for weight in weights for need in needs)


def _shape(weight: Tensor, need: str) -> tuple[int, int]:
    rows, columns = weight.shape
    return (rows, rows if need == OUTPUT_GRAM else columns)


def _gather(decoder: Decoder, tokens: Tensor, needs: Collection[str], folder: Path) -> None:
    blocks = len(decoder)
    inputs = decoder.inputs(tokens, batch=1)
    reached = min((index for index in range(1, blocks + 1) if _slope(folder, index).exists()), default=None)
    if reached is None:
        outputs = _store_inputs(decoder, inputs, folder)
        _save(_slope(folder, blocks), {"gradient": _loss_gradient(decoder, tokens, outputs)})
        reached = blocks
        del outputs
    inputs = replace(inputs, hidden=torch.empty(0))  # what is needed of them lies on disk
    slope = _load(_slope(folder, reached), "gradient")  # of the loss, at the outputs of the block
    for index in reversed(range(reached)):
        with decoder.block(index) as block:
            sums = _go_back(block, inputs, _load(_input(folder, index), "hidden"), slope, needs)
        _save(gradient_file(folder, index), sums)
        if index:
            _save(_slope(folder, index), {"gradient": slope})
        _slope(folder, index + 1).unlink()
        _input(folder, index).unlink()


def _store_inputs(decoder: Decoder, inputs: BlockInputs, folder: Path) -> Tensor:
    """Write the dense inputs of every block that has none yet; the outputs `[samples, tokens, hidden]` of the last."""
    blocks = len(decoder)
    start = max((index for index in range(blocks) if _input(folder, index).exists()), default=None)
    hidden = inputs.hidden if start is None else _load(_input(folder, start), "hidden")
    for index in range(start or 0, blocks):
        if index != start:
            _save(_input(folder, index), {"hidden": hidden})
        with decoder.block(index) as block:
            block.run(inputs, hidden, into=hidden)
    return hidden


def _loss_gradient(decoder: Decoder, tokens: Tensor, hidden: Tensor) -> Tensor:
    """The gradient of each sequence's summed loss at the last block's outputs, `[samples, tokens, hidden]`.

    A sum, since the mean's gradients would vanish in float16; whoever reads them divides.
    """
    logits_of = decoder.head()
    gradients = torch.empty_like(hidden)
    for sample, ids in enumerate(tokens):
        leaf = hidden[sample : sample + 1].to(decoder.device).requires_grad_()
        logits = logits_of(ids[None], leaf)[0, :-1].float()  # [length - 1, vocabulary]
        loss = cross_entropy(logits, ids[1:].to(decoder.device), reduction="sum")
        if not bool(torch.isfinite(loss)):
            raise NumericalError(f"the loss of calibration sample {sample} is NaN or infinite; {REMEDY}")
        gradients[sample : sample + 1] = torch.autograd.grad(loss, leaf)[0]
    return gradients


def _go_back(
    block: Block, inputs: BlockInputs, hidden: Tensor, slope: Tensor, needs: Collection[str]
) -> dict[str, Tensor]:
    """The block's statistics; `slope`, the gradient at its outputs, becomes in place the gradient at its inputs."""
    device = next(block.module.parameters()).device
    for projection in block.projections:
        projection.stored.requires_grad_()
    weights = {projection.name: projection.weight for projection in block.projections}
    sums = {
        f"{need}.{name}": torch.zeros(_shape(weight, need), dtype=torch.float32, device=device)
        for name, weight in weights.items()
        for need in needs
    }
    grams = {name: sums[f"{OUTPUT_GRAM}.{name}"] for name in weights} if OUTPUT_GRAM in needs else {}
    samples, length = hidden.shape[:2]
    for sample in range(samples):
        leaf = hidden[sample : sample + 1].to(device).requires_grad_()
        with summed_output_grams(block, grams):
            torch.autograd.backward(block.output(inputs, leaf), slope[sample : sample + 1].to(device))
        slope[sample : sample + 1].copy_(leaf.grad)  # type: ignore[arg-type]  # it has one after backward
        for name, gradient in projection_gradients(block):
            mean_loss = gradient.float() / (length - 1)
            for need, part in zip(WEIGHT_GRADIENTS, (mean_loss, mean_loss.square()), strict=True):
                if need in needs:
                    sums[f"{need}.{name}"] += part
        for projection in block.projections:
            projection.stored.grad = None
    for key, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            name = key.partition(".")[2]
            raise NumericalError(f"{name}: the gradient of the loss holds NaN or infinite numbers; {REMEDY}")
        total /= samples
    return {key: total.cpu() for key, total in sums.items()}


def projection_gradients(block: Block) -> Iterator[tuple[str, Tensor]]:
    """Each projection's gradient; one that no token reached has none, which counts as zero."""
    for projection in block.projections:
        gradient = projection.gradient
        if gradient is not None:
            yield projection.name, gradient


def _input(folder: Path, index: int) -> Path:
    return folder / f"block-input-{index}.safetensors"


def _slope(folder: Path, index: int) -> Path:
    """The gradient at the inputs of block `index`, which are the outputs of the one before."""
    return folder / f"loss-gradient-{index}.safetensors"


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_tensors(path, tensors)


def _load(path: Path, name: str) -> Tensor:
    return _read(path, [name])[name]


def _read(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    try:
        stored: dict[str, Tensor] = load_file(path)
        return {name: stored[name] for name in names}
    except (SafetensorError, OSError, KeyError) as error:
        raise CorruptFile(f"{path} is missing or damaged ({error}): start the run again with --force") from error
