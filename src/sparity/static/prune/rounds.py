"""Rounds of regional optimisation: prune a block, train it, prune it again (Yang et al. 2025, arXiv:2503.04992)."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from sparity.calibration.evidence import BlockEvidence, Region
from sparity.calibration.walk import Gathered
from sparity.errors import InvalidInput, NumericalError
from sparity.models import Block
from sparity.models.float32 import computes_in_float32
from sparity.quality.block_error import token_error
from sparity.sections import Number, Section, Whole
from sparity.stages import BlockEdit
from sparity.stages.base import Workload
from sparity.visible import logger

log = logger(__name__)

HELD_OUT = 4  # one sequence of so many judges
FP32 = 4
COPIES = 5  # of a block in float32 at once: it, the dense one, one-shot weights, gradients and their squares
FLOPS = 8.0  # per weight and token of a step: the dense block forwards, the sparse one forwards and back

PruneOnce = Callable[[BlockEvidence], BlockEdit]


class Rounds(Section):
    """How often a block is trained between two prunings, and how far."""

    count: Whole = Field(5, ge=1, description="rounds: prune, then a step of RMSprop for each of some sequences")
    rate: Number = Field(3e-7, gt=0, description="the learning rate")
    samples: Whole = Field(32, ge=1, description="calibration sequences that a round learns from")

    def flops(self, weights: int, work: Workload) -> float:
        """Multiplications and additions of all steps on so many weights."""
        sequences = max(min(self.samples, work.samples - judges(work.samples)), 0)
        return FLOPS * weights * self.count * sequences * work.length

    def memory(self, weights: int) -> int:
        """Bytes at once, for a block of so many weights."""
        return COPIES * FP32 * weights


def judges(sequences: int) -> int:
    """How many of the calibration sequences, the last ones, no step learns from."""
    return max(sequences // HELD_OUT, 1)


def prune_in_rounds(rounds: Rounds, evidence: BlockEvidence, region: Region, prune: PruneOnce) -> BlockEdit:
    """Prune a block in place, in rounds where that brings its output nearer to the dense block's, else at once.

    All zeros of the pattern are there at the end, since pruning is the last step. Errors are those of the sequences
    that judge: `token_error`, the mean over them.

    Args:
        rounds: how many, and how far.
        evidence: of the dense block, which is pruned.
        region: its sequences.
        prune: prunes the block in place by some evidence of it.

    Raises:
        InvalidInput: there are fewer than two sequences.
        NumericalError: the loss is NaN or infinite.
    """
    block, learned = evidence.block, len(region) - judges(len(region))
    if learned < 1:
        raise InvalidInput(
            "prune: rounds learn from some calibration sequences and are judged by others: give 2 samples or more"
        )
    dense = replace(block, module=copy.deepcopy(block.module))
    at_once = prune(evidence)
    plain, before = copy.deepcopy(block.module.state_dict()), _error(block, dense, region)
    block.module.load_state_dict(dense.module.state_dict())
    with computes_in_float32(block.module), computes_in_float32(dense.module):
        _optimise(rounds, evidence, region, dense, learned, prune)
    again = prune(replace(region.look(), masks=evidence.masks))
    after = _error(block, dense, region)
    log.info("%s: error %.4g pruned at once, %.4g after %d rounds", block.name, before, after, rounds.count)
    if after < before:
        if evidence.losses is not None:
            _measure_losses(evidence.losses, region, dense)
        return again
    block.module.load_state_dict(plain)
    note = f"{block.name}: rounds leave its output no nearer to the dense one ({after:.4g}, not {before:.4g}): put back"
    return replace(at_once, notes=(*at_once.notes, note))


def _optimise(
    rounds: Rounds, evidence: BlockEvidence, region: Region, dense: Block, learned: int, prune: PruneOnce
) -> None:
    """The rounds, on a block in float32; its weights are nowhere zero behind a step, but where `masks` say so."""
    block, inputs = evidence.block, region.visit.inputs
    trained = list({id(projection.stored): projection.stored for projection in block.projections}.values())
    optimiser = torch.optim.RMSprop(trained, rounds.rate)
    for number in range(rounds.count):
        generator = torch.Generator().manual_seed(number)
        chosen = torch.randperm(learned, generator=generator)[: rounds.samples].tolist()
        prune(_as_it_is(evidence, region))
        for parameter in trained:
            parameter.requires_grad_()
        for place in chosen:
            hidden = region.sequence(place)
            with torch.no_grad():
                wanted = dense.output(inputs, hidden)
            loss = nn.functional.mse_loss(block.output(inputs, hidden), wanted, reduction="sum")
            if not bool(torch.isfinite(loss)):
                raise NumericalError(f"{block.name}: the loss of round {number + 1} is {loss.item()}: lower its rate")
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            _zero(block, evidence.masks)
        for parameter in trained:
            parameter.requires_grad_(False)


def _as_it_is(evidence: BlockEvidence, region: Region) -> BlockEvidence:
    """The block as it is now, with the dense one's gradients; experts that no token reaches are left out."""

    def gather() -> Gathered:
        return ((site, found) for site, found in region.gather() if found.tokens or not found.needs)

    return BlockEvidence(evidence.block, gather, evidence.gradients, evidence.masks)


def _zero(block: Block, masks: Mapping[str, Tensor]) -> None:
    """Zeros of earlier stages stay."""
    for projection in block.projections:
        if projection.name in masks:
            projection.weight.mul_(masks[projection.name])


def _error(block: Block, dense: Block, region: Region) -> float:
    """How far a block's output is from the dense one's, mean over the sequences that judge."""
    inputs, errors = region.visit.inputs, []
    with computes_in_float32(block.module), computes_in_float32(dense.module), torch.no_grad():
        for place in range(len(region) - judges(len(region)), len(region)):
            hidden = region.sequence(place)
            errors.append(token_error(dense.output(inputs, hidden)[0], block.output(inputs, hidden)[0]))
    return sum(errors) / len(errors)


def _measure_losses(losses: dict[str, float], region: Region, dense: Block) -> None:
    """The losses of the weights that the block has now, against the dense ones."""
    block = region.visit.block
    found = {projection.name: projection.weight.clone() for projection in block.projections}
    block.module.load_state_dict(dense.module.state_dict())
    for site, _ in BlockEvidence(block, region.gather, losses=losses).sites():
        for projection in site.projections:
            projection.write(found[projection.name])
