"""Whole parts of a model removed by a published method: a smaller stock model."""

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from sparity import registry
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.outline import outlined
from sparity.models.cuts.whole import ragged_problem, stock_problem
from sparity.registry import register
from sparity.sections import Number, Spec
from sparity.stages import Change, Decision, Needs, Reshaped, ShapeStage
from sparity.stages.base import Estimate, Property, Workload
from sparity.static.structure.methods.base import Method
from sparity.static.structure.subject import Subject


@register("stage", "structure")
class Structure(ShapeStage):
    """Remove channels, heads, numbers of the hidden size, blocks or experts by a method of `structure.method`.

    The whole model is in memory while it works. What comes out is an ordinary model of the same architecture with one
    size for every block, which stock transformers opens; a method or option whose result no configuration can say is
    refused. With `shapes: ragged` blocks may differ: `sparity.load` opens the result, and llama.cpp as `deci`.
    """

    preserves: ClassVar[frozenset[Property]] = frozenset()

    method: Spec = Field("minitron", description="what is removed, and how it is chosen; `sparity methods` lists all")
    sparsity: Number = Field(0.25, ge=0, lt=1, description="share to remove, in [0, 1); of what, the method says")

    shapes: Literal["uniform", "ragged"] = Field(
        "uniform", description="whether all blocks have the same sizes, or each may have its own"
    )

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        return f"{self.how}, {self._built().words(self.sparsity)}"

    @property
    def how(self) -> str:
        """See `Stage.how`."""
        built = self._built()
        dimension = getattr(built, "dimension", None)
        return built.name if dimension is None else f"{built.name}, {dimension}"

    @property
    def ragged(self) -> bool:
        """See `Stage.ragged`."""
        return self.shapes == "ragged" and self.sparsity > 0

    def needs(self) -> Needs:
        """See `Stage.needs`."""
        return Needs(text=self._built().needs_text and self.sparsity > 0)

    def decide(self, model: Decoder, evidence: object) -> Decision:
        """How many units of each dimension stay, on average where blocks differ: `{"sizes": {dimension: number}}`.

        Raises:
            InvalidInput: sizes that the model cannot have, or that its configuration cannot say.
        """
        built = self._built()
        sizes = built.sizes_on_average if self.ragged else built.sizes
        decision: Decision = {"sizes": sizes(model, self.sparsity) if self.sparsity else {}}
        self.after(model, decision)
        return decision

    def after(self, model: Decoder, decision: Decision) -> Decoder:
        """See `Stage.after`."""
        if not self.sparsity:
            return model
        return outlined(model, decision["sizes"], self._built().config_changes(model))

    def reshape(self, model: nn.Module, tokens: Tensor | None, decision: Decision) -> Reshaped:
        """See `ShapeStage.reshape`."""
        if not self.sparsity:
            return Reshaped(model, {})
        found = self._built().restructure(Subject(model, tokens), self.sparsity)
        problem = ragged_problem(found.model) if self.ragged else stock_problem(found.model)
        if problem:
            raise InvalidInput(f"structure ({self.how}): no configuration can say the result: {problem}")
        return Reshaped(found.model, found.kept)

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        after = self.after(model, decision)
        before = {name: shape for index in range(len(model)) for name, _, shape in _shapes(model, index)}
        changes = tuple(
            Change(self.name, name, role, index, before[name], shape, 0.0)
            for index in range(len(after))
            for name, role, shape in _shapes(after, index)
        )
        weights = sum(rows * columns for rows, columns in before.values())
        own = self._built().estimate(weights, work) if self.sparsity else Estimate()
        both = {"the model and the one made of it": 2 * weights * model.dtype.itemsize}
        return replace(own, changes=changes, memory={**both, **own.memory})

    def _built(self) -> Method:
        built: Method = registry.build("structure.method", self.method)
        return built


def _shapes(model: Decoder, index: int) -> Iterator[tuple[str, str, tuple[int, int]]]:
    for site in model.sites(index):
        for projection in site.projections:
            rows, columns = projection.weight.shape
            yield projection.name, projection.role, (rows, columns)
