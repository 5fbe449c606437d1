"""What a method of healing is, what it is given, and what it leaves."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.stages.allocation import projections
from sparity.stages.base import Estimate, Workload
from sparity.stages.kinds import Workspace
from sparity.training.fine_tune.options import FP32, PASSES
from sparity.training.fine_tune.steps import FLOATS, Course


@dataclass(frozen=True)
class Task:
    """A sparse model that is to be healed, in place.

    Attributes:
        model: a transformers causal language model.
        masks: projection -> bool `[out, in]`, False where a zero must stay.
        tokens: what it learns from, token ids `[samples, length]`.
        blocks: which of the dense model's blocks each of its own was.
        work: keeps what a killed healing needs to go on with the same bits.
        load_dense: gives the dense model.
        places: which of the calibration sequences these are; without it, all of them.
    """

    model: nn.Module
    masks: Mapping[str, Tensor]
    tokens: Tensor
    blocks: Sequence[int]
    work: Workspace
    load_dense: Callable[[], nn.Module] = field(repr=False)
    places: Sequence[int] | None = None

    @cached_property
    def dense(self) -> nn.Module:
        """The dense model, loaded when it is first asked for; nobody changes it."""
        return self.load_dense()


@dataclass(frozen=True)
class Healed:
    """What a method leaves beside the weights; see `Trained`."""

    curves: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    runtime: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


class Method(ABC):
    """A frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    @property
    def adds(self) -> bool:
        """Whether weights stay as they are, and what it finds is added while the model runs."""
        return False

    @property
    def compares(self) -> bool:
        """Whether matrices, or what they give, are held against those of the dense model."""
        return False

    @property
    def words(self) -> str:
        """The method in a few words, such as "lora, rank 8"."""
        return self.name

    def declines(self, model: Decoder) -> str | None:
        """Why the method cannot heal a model, known by its shapes alone; None when it can."""
        return None

    def config_changes(self, model: Decoder) -> Mapping[str, Any]:
        """The configuration's attributes that it changes, with their new values."""
        return {}

    def prepared(self, model: nn.Module) -> nn.Module:
        """The model with what `config_changes` says, in place; it still computes what it did."""
        return model

    @abstractmethod
    def estimate(self, model: Decoder, work: Workload) -> Estimate:
        """What it takes and leaves, predicted from shapes; changes are not listed."""

    @abstractmethod
    def heal(self, task: Task) -> Healed:
        """Bring `task.model` nearer to the dense one, in place; zeros stay where `task.masks` is False.

        Raises:
            InvalidInput: the two models do not fit each other.
            NumericalError: numbers that are not finite.
        """


@dataclass(frozen=True)
class Training(Method):
    """A method that trains in steps of AdamW.

    Attributes:
        steps: how many.
        rate: the learning rate at the start; it falls to 0 along half a cosine.
        batch: sequences per step.
    """

    steps: int = 100
    rate: float = 1e-4
    batch: int = 4

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or not 0 < self.rate < float("inf"):
            raise InvalidInput(f"{self.name}: rate and batch must be positive, steps 0 or more")

    @property
    def words(self) -> str:
        """See `Method.words`."""
        return f"{self.name}, {self.steps} steps"

    def estimate(self, model: Decoder, work: Workload) -> Estimate:
        """See `Method.estimate`."""
        weights, trained = weights_of(model), self.trained(model)
        return Estimate(
            flops=PASSES * weights * self.steps * self.batch * work.length,
            memory={"weights, gradients and moments": FP32 * (weights + FLOATS * trained)},
            disk={"the last step": FLOATS * FP32 * trained},
        )

    def trained(self, model: Decoder) -> int:
        """How many numbers are trained."""
        return weights_of(model)

    def healed(self, course: Course) -> Healed:
        """What a training leaves: its losses, and what is to be said of its end."""
        if course.stopped is None:
            return Healed(curves={"loss": course.losses})
        note = (
            f"heal ({self.name}): the loss grew out of bounds in step {course.stopped}; the weights are those of step "
            f"{len(course.losses)}, the last that was kept. A lower rate may go further."
        )
        return Healed(curves={"loss": course.losses}, notes=(note,))


def weights_of(model: Decoder) -> int:
    """The weights of all projections."""
    return sum(projection.weight.numel() for _, projection in projections(model))
