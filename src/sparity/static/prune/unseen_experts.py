"""Experts that no calibration token was routed to, of which no score knows anything."""

from dataclasses import replace
from typing import Literal

from torch import Tensor

from sparity import registry
from sparity.calibration import Statistics
from sparity.calibration.evidence import BlockEvidence
from sparity.errors import NumericalError
from sparity.models.block import Projection
from sparity.static.prune.pruning import Pruning
from sparity.visible import logger

log = logger(__name__)

Treatment = Literal["error", "magnitude", "dense"]


def is_unseen(evidence: BlockEvidence, projection: Projection, known: Statistics) -> bool:
    """Whether no token reached an expert; where none were counted, all gradients of its matrices are zero then."""
    if projection.expert is None or known.needs:
        return projection.expert is not None and not known.tokens
    expert = (p for p in evidence.block.projections if (p.module, p.expert) == (projection.module, projection.expert))
    gradients = [found for p in expert for found in evidence.gradients.get(p.name, {}).values()]
    return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)


def treat(
    treatment: Treatment,
    pruning: Pruning,
    projection: Projection,
    statistics: Statistics,
    sparsity: float,
    mask: Tensor | None,
) -> Tensor:
    """The weight `[out, in]` of an unseen expert, as the options say.

    Raises:
        NumericalError: they say that it is an error.
    """
    weight = projection.weight.clone()
    or_silent = "" if statistics.needs else ", or none that makes a difference"
    why = f"{projection.name}: no calibration token was routed to this expert{or_silent}"
    if treatment == "error":
        raise NumericalError(
            f"{why}; calibrate on more or other text, or set `unseen_expert: magnitude` or `unseen_expert: dense`"
        )
    log.warning("%s; treated by: %s", why, treatment)
    if treatment == "dense":
        return weight
    plain = {
        "score": registry.build("prune.score", "magnitude"),
        "solver": registry.build("prune.solver", "mask_only"),
    }
    return replace(pruning, **plain).apply(weight, statistics, sparsity, mask)[0]
