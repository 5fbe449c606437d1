"""Compresso: masks trained with low ranks beside weights that stay (Guo et al. 2023, arXiv:2310.05015)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sparity.calibration.gradients import check_length
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.outline import outlined
from sparity.models.cuts.whole import blocks_of, cut_model
from sparity.models.dimensions import CHANNELS
from sparity.models.float32 import in_float32
from sparity.registry import register
from sparity.stages.base import Estimate, Workload
from sparity.static.structure.constraints import Axis, Constraint, axes_of, part_sizes
from sparity.static.structure.low_ranks import low_ranks, stored_with
from sparity.static.structure.masked import fold, mask_places
from sparity.static.structure.methods.base import Choice, Method, Restructured, trainable_as
from sparity.static.structure.shearing import Training, settle_kept, train_masks
from sparity.static.structure.subject import Subject
from sparity.static.structure.weight_share import WeightShare, parts_of

USUAL = 0.3  # of the weights, where nobody says how much: what the authors' script removes
GROWTH = 0.5  # the share of the steps over which the target grows, as there
ADAPTED = ("q", "v", "qkv")  # the roles beside whose weights low ranks are trained, as there
FP32 = 4
PASSES = 4.0  # multiplications and additions per weight and token: forward, and backward to the inputs


@register("structure.method", "compresso")
@dataclass(frozen=True)
class Compresso(Method):
    """Train hard concrete masks on channels and heads, and low ranks of q and v, while the weights stay; cut what is 0.

    All units compete under one constraint, the share of their weights that goes (`share: model`), or each block is to
    lose that share of its channels and of its heads (`share: block`). `heads: false` masks channels alone; `rate: 0`
    trains masks alone.
    """

    share: Literal["model", "block"] = "model"
    heads: bool = True
    steps: int = 200
    rate: float = 5e-5
    mask_rate: float = 1.0
    batch: int = 4
    rank: int = 8
    alpha: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"compresso: `{name}` must be 1 or more, not {getattr(self, name)}")
        if not 0 <= self.rate < math.inf:
            raise InvalidInput(f"compresso: `rate` must be 0 or more, not {self.rate:g}")
        for name in ("mask_rate", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInput(f"compresso: `{name}` must be positive, not {getattr(self, name):g}")

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """log alpha of every mask, trained until three tenths of the weights go."""
        axes, _ = self.train(subject, cut_model(subject.model, {}), USUAL)
        return {axis.name: axis.scores(subject.depth) for axis in axes}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        return dict(self.restructure(subject, sparsity).kept)

    def restructure(self, subject: Subject, sparsity: float) -> Restructured:
        """See `Method.restructure`; without anything to remove, nothing is trained."""
        model = cut_model(subject.model, {})
        kept = self.train(subject, model, sparsity)[1] if sparsity else {}
        smaller = cut_model(model, kept)
        trainable_as(subject.model, smaller)
        return Restructured(smaller, kept)

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        if self.share != "block":
            raise InvalidInput(
                "compresso lets blocks have different sizes, which no stock configuration can say: set `share: block` "
                "for equal ones, or `shapes: ragged` of the stage"
            )
        return self.sizes_on_average(decoder, sparsity)

    def sizes_on_average(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes_on_average`."""
        sizes = part_sizes(decoder, sparsity)
        return sizes if self.heads else {CHANNELS: sizes[CHANNELS]}

    def estimate(self, weights: int, work: Workload) -> Estimate:
        """See `Method.estimate`."""
        flops = PASSES * weights * self.steps * self.batch * work.length
        return Estimate(flops=flops, memory={"a copy in float32": FP32 * weights})

    def train(self, subject: Subject, model: nn.Module, sparsity: float) -> tuple[list[Axis], Choice]:
        """Train masks and low ranks and write both into the weights of a model, in place; the units that are not 0."""
        sizes = self.sizes_on_average(subject.decoder, sparsity)
        least = sizes if self.share == "block" else dict.fromkeys(sizes, 1)
        outlined(subject.decoder, least, {})  # refuses what no configuration can say
        check_length(subject.tokens)
        axes = axes_of(subject.decoder, least)
        if not axes:
            return [], {}
        whole = WeightShare(axes, parts_of(subject, [axis.name for axis in axes]), sparsity)
        constraints: Sequence[Constraint] = axes if self.share == "block" else [whole]
        places = mask_places(model, subject.family)
        every = [each for block in blocks_of(model, subject.family) for each in block.projections]
        training = Training(self.steps, self.rate, self.mask_rate, self.batch, self.seed, GROWTH)
        with in_float32(model):
            with low_ranks(stored_with(every, ADAPTED), self.rank, self.alpha / self.rank, self.seed) as found:
                weights = list(dict.fromkeys(part for each in found.values() for part in each.layer.parameters()))
                train_masks(model, weights, places, axes, constraints, subject.tokens, training)
            kept = {axis.name: axis.kept(subject.depth) for axis in axes} if self.share == "block" else whole.kept()
            fold(places, settle_kept(axes, kept))
        return axes, kept
