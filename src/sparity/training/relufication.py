"""ReLUfication: the MLPs' function becomes ReLU, and training makes its outputs sparse and good again.

As in ProSparse (Song et al. 2024, arXiv:2402.13516): an L1 penalty whose weight rises along half a sine.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.activation_functions import activation_functions, function_attribute
from sparity.registry import register
from sparity.sections import Number
from sparity.stages.base import Decision, ModelEvidence
from sparity.stages.kinds import Trained, Workspace
from sparity.training.fine_tune.options import FineTune
from sparity.training.fine_tune.steps import next_token_loss, train_blocks


@register("stage", "relufication")
class Relufication(FineTune):
    """ReLU in place of the MLPs' function, and a fine-tune that makes its outputs sparse."""

    function: Literal["relu", "keep"] = Field(
        "relu", description="relu, or keep: the function that the model has, which the penalty alone makes sparse"
    )
    penalty: Annotated[Number, Field(ge=0)] = Field(
        0.01, description="weight of the mean magnitude of the functions' outputs, at the end of its rise"
    )
    warm_up: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.2, description="share of the steps before the penalty begins to rise"
    )

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        return f"{'ReLU' if self.function == 'relu' else 'penalty'}, {self.steps} steps"

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """The functions as they will be: `{"function": name, "steps": n}`.

        Raises:
            InvalidInput: the model's configuration names no function, or its MLPs hold none.
        """
        attribute = function_attribute(model.config)
        if not activation_functions(model.skeleton, model.family.blocks):
            raise InvalidInput(
                "relufication: the MLPs of this model apply no function of a module of their own: leave the stage out"
            )
        function = "relu" if self.function == "relu" else str(getattr(model.config, attribute))
        return {"function": function, "steps": self.steps}

    def config_changes(self, model: Decoder) -> Mapping[str, Any]:
        """See `ModelStage.config_changes`."""
        return {function_attribute(model.config): "relu"} if self.function == "relu" else {}

    def train(self, model: nn.Module, masks: Mapping[str, Tensor], tokens: Tensor, work: Workspace) -> Trained:
        """See `ModelStage.train`."""
        config: Any = model.config
        found = activation_functions(model, "")
        if self.function == "relu":
            setattr(config, function_attribute(config), "relu")
            for parent, name in found:
                setattr(parent, name, nn.ReLU())
            found = activation_functions(model, "")
        if not self.steps:
            return Trained()
        functions = [getattr(parent, name) for parent, name in found]

        def loss(ids: Tensor, step: int) -> Tensor:
            with magnitudes(functions) as sizes:
                of_text = next_token_loss(model, ids)
            mean = sum(sizes[1:], sizes[0]) / len(sizes)
            return of_text + rising(step, self.steps, self.warm_up, self.penalty) * mean

        course = train_blocks(model, masks, tokens, work, loss, steps=self.steps, rate=self.rate, batch=self.batch)
        return Trained(curves={"loss": course.losses})


def rising(step: int, steps: int, warm_up: float, peak: float) -> float:
    """The penalty's weight in a step: 0 while it warms up, then along half a sine to its peak."""
    begun = warm_up * steps
    if step < begun:
        return 0.0
    way = (step - begun) / max(steps - 1 - begun, 1)
    return peak * (math.sin(math.pi * (min(way, 1.0) - 0.5)) + 1) / 2


@contextmanager
def magnitudes(functions: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the context the mean magnitude of what each function gives is noted, with its gradient."""
    noted: list[Tensor] = []

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        noted.append(output.float().abs().mean())

    with ExitStack() as hooks:
        for function in dict.fromkeys(functions):
            hooks.callback(function.register_forward_hook(after).remove)
        yield noted
