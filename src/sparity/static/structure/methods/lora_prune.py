"""LoRAPrune: parts by the gradients of a low rank that is trained meanwhile (Zhang et al. 2023, arXiv:2305.18403)."""

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparity.calibration.gradients import check_length
from sparity.errors import InvalidInput
from sparity.models.cuts.whole import blocks_of, cut_model
from sparity.models.dimensions import Dimension
from sparity.models.float32 import in_float32
from sparity.models.ragged import block_config
from sparity.registry import register
from sparity.static.structure.low_rank_importance import Group, cubic_sparsity, groups_of, observe
from sparity.static.structure.low_ranks import low_ranks
from sparity.static.structure.methods.base import Choice, Restructured, trainable_as
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import left_of, stacked
from sparity.static.structure.whole_ends import WholeEnds
from sparity.training.fine_tune.in_memory import InMemory
from sparity.training.fine_tune.steps import Schedule, descend, next_token_loss, places


@register("structure.method", "lora_prune")
@dataclass(frozen=True)
class LoRAPrune(WholeEnds):
    """Train a low rank beside every weight and remove, every few steps, the channels and heads that matter least by it.

    The gradient of a weight is estimated from those of its low rank alone. A unit's importance is the sum of what its
    weights times their gradients come to, of norm one in each projection, averaged over the steps. In the end the low
    ranks are merged and what is gone is cut out. Scores are those of a training in which nothing goes.
    """

    steps: int = 100
    rate: float = 1e-4
    batch: int = 4
    rank: int = 8
    alpha: float = 16.0
    every: int = 10
    warmup: float = 0.1
    cooldown: float = 0.1
    decay: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "every"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"lora_prune: `{name}` must be 1 or more, not {getattr(self, name)}")
        if not 0 < self.rate < math.inf or not 0 < self.alpha < math.inf:
            raise InvalidInput(f"lora_prune: `rate` and `alpha` must be positive, not {self.rate:g}, {self.alpha:g}")
        if not 0 <= self.decay < 1:
            raise InvalidInput(f"lora_prune: `decay` must lie in [0, 1), not {self.decay:g}")
        if not min(self.warmup, self.cooldown) >= 0 or not self.warmup + self.cooldown < 1:
            raise InvalidInput(
                "lora_prune: `warmup` and `cooldown` are shares of the steps, and some must be left between them, not "
                f"{self.warmup:g}, {self.cooldown:g}"
            )

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        found: dict[str, list[Tensor | None]] = {}
        for group in self.train(subject, cut_model(subject.model, {}), 0.0, range(subject.depth)):
            found.setdefault(group.dimension.name, [None] * subject.depth)[group.block] = group.average
        return {name: stacked(rows) for name, rows in found.items()}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        return dict(self.restructure(subject, sparsity).kept)

    def restructure(self, subject: Subject, sparsity: float) -> Restructured:
        """See `Method.restructure`; without anything to remove, nothing is trained."""
        model, cut, kept = cut_model(subject.model, {}), self.cut_blocks(subject.depth), Choice()
        for index in cut:  # what no model of its kind can be is refused before the training
            left = {each.name: self.left(each, sparsity) for each in subject.decoder.dimensions(index)}
            subject.family.resize_block(block_config(subject.config, index), index, left, check=False)
        for group in self.train(subject, model, sparsity, cut) if sparsity else ():
            rows = kept.setdefault(group.dimension.name, [None] * subject.depth)
            rows[group.block] = group.stays.nonzero().flatten().tolist()
        smaller = cut_model(model, kept)
        trainable_as(subject.model, smaller)
        return Restructured(smaller, kept)

    def usual(self, depth: int) -> tuple[int, int]:
        """See `WholeEnds.usual`: the first tenth, and the last block."""
        return int(depth * 0.1), 1

    def left(self, dimension: Dimension, sparsity: float) -> int:
        """See `WholeEnds.left`."""
        return left_of(dimension.size, sparsity)

    def train(self, subject: Subject, model: nn.Module, sparsity: float, watched: range) -> list[Group]:
        """Train and merge low ranks beside all weights of a model, in place; the units of the blocks that are watched.

        Those that go are zero afterwards.
        """
        tokens = subject.tokens
        check_length(tokens)
        blocks = blocks_of(model, subject.family)
        groups = groups_of([blocks[index] for index in watched], subject.family, subject.config)
        every = [projection for block in blocks for projection in block.projections]
        with in_float32(model), low_ranks(every, self.rank, self.alpha / self.rank, self.seed) as adapted:

            def loss(step: int) -> Tensor:
                with parametrize.cached():
                    return next_token_loss(model, tokens[places(step, self.batch, len(tokens))])

            def before(step: int) -> None:
                observe(groups, adapted, self.decay)
                gone = cubic_sparsity(step, self.steps, sparsity, self.warmup, self.cooldown)
                if gone and (step % self.every == 0 or gone == sparsity):
                    for group in groups:
                        group.keep(self.left(group.dimension, gone), adapted)

            layers = dict.fromkeys(each.layer for each in adapted.values())
            trained = {f"{n}.{name}": part for n, layer in enumerate(layers) for name, part in layer.named_parameters()}
            descend(trained, loss, InMemory(), Schedule(self.steps, self.rate, every=self.steps), before=before)
        return groups
