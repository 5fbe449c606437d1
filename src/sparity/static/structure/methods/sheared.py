"""Sheared LLaMA: masks and weights trained towards a given shape (Xia et al. 2024, arXiv:2310.06694)."""

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from sparity.calibration.gradients import check_length
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.outline import outlined
from sparity.models.cuts.whole import cut_model
from sparity.models.dimensions import CHANNELS, DEPTH, HIDDEN, KV_GROUPS, QUERY_HEADS
from sparity.registry import register
from sparity.stages.base import Estimate, Workload
from sparity.static.structure.constraints import Axis, axes_of, full_sizes, part_sizes
from sparity.static.structure.masked import fold, mask_places
from sparity.static.structure.methods.base import Choice, Method, Restructured
from sparity.static.structure.shearing import Training, settle, shear
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import check_names

HALF = 0.5  # of what is removed where nobody says how much
FP32 = 4
TRAINED = 4  # numbers per weight that is trained: it, its gradient, and two moments
PASSES = 6.0  # multiplications and additions per weight and token, forward and backward


@register("structure.method", "sheared")
@dataclass(frozen=True)
class Sheared(Method):
    """Multiply parts with hard concrete masks, trained with the weights on the text under constraints; cut what is 0.

    The shape is what the options named after dimensions say, of which the others stay whole; without any, `sparsity`
    of the channels and of the heads of every block goes. `rate: 0` trains the masks alone.
    """

    depth: int | None = None
    hidden_size: int | None = None
    kv_groups: int | None = None
    query_heads: int | None = None
    mlp_channels: int | None = None
    steps: int = 200
    rate: float = 1e-4
    mask_rate: float = 1.0
    batch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 <= self.rate < float("inf"):
            raise InvalidInput("sheared: steps and batch must be 1 or more, rate 0 or more")
        if not 0 < self.mask_rate < float("inf"):
            raise InvalidInput("sheared: mask_rate must be positive")

    @property
    def shape(self) -> dict[str, int]:
        """Dimension -> how many units are to stay, of those that the options name."""
        named = {name: getattr(self, name) for name in (DEPTH, HIDDEN, KV_GROUPS, QUERY_HEADS, CHANNELS)}
        return {name: size for name, size in named.items() if size is not None}

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """log alpha of every mask, trained towards the shape, or towards half of the channels and heads."""
        return {axis.name: axis.scores(subject.depth) for axis in self._sheared(subject, HALF)[1]}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        return dict(self.restructure(subject, sparsity).kept)

    def restructure(self, subject: Subject, sparsity: float) -> Restructured:
        """The trained model without what is masked; what is left has its masks in its weights."""
        if not sparsity:
            return Restructured(copy.deepcopy(subject.model), {})
        model, axes = self._sheared(subject, sparsity)
        kept = {axis.name: axis.kept(subject.depth) for axis in axes}
        return Restructured(cut_model(model, kept), kept)

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        full = full_sizes(decoder)
        wanted = self.shape or part_sizes(decoder, sparsity)
        check_names(wanted, full, self.name)
        for name, size in wanted.items():
            if not 1 <= size <= full[name]:
                raise InvalidInput(f"{self.name}: {name} of this model can become 1 to {full[name]}, not {size}")
        return wanted

    def words(self, sparsity: float) -> str:
        """See `Method.words`."""
        if not self.shape:
            return super().words(sparsity)
        return ", ".join(f"{name} {size}" for name, size in self.shape.items())

    def estimate(self, weights: int, work: Workload) -> Estimate:
        """See `Method.estimate`."""
        held = FP32 * weights * (TRAINED if self.rate else 1)
        flops = PASSES * weights * self.steps * self.batch * work.length
        return Estimate(flops=flops, memory={"weights, gradients and moments": held})

    def _sheared(self, subject: Subject, sparsity: float) -> tuple[nn.Module, list[Axis]]:
        """A copy of the model, trained and with the masks in its weights, and the masks."""
        wanted = self.sizes(subject.decoder, sparsity)
        outlined(subject.decoder, wanted, {})  # refuses what no configuration can say
        check_length(subject.tokens)
        axes = axes_of(subject.decoder, wanted)
        model = copy.deepcopy(subject.model)
        types = {parameter: parameter.dtype for parameter in model.parameters()}
        for parameter in types:
            parameter.data = parameter.data.float()
        if axes:
            places = mask_places(model, subject.family)
            training = Training(self.steps, self.rate, self.mask_rate, self.batch, self.seed)
            shear(model, places, axes, subject.tokens, training)
            fold(places, settle(axes))
        for parameter, kind in types.items():
            parameter.data = parameter.data.to(kind)
        return model, axes
