"""What a method of structured pruning is: it scores parts of a model, chooses what stays, makes the smaller model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sparity.models import Decoder
from sparity.models.cuts.whole import cut_model
from sparity.stages.base import Estimate, Workload
from sparity.static.structure.subject import Subject

Choice = dict[str, Any]  # dimension -> the indices that stay: per block, or of the model


@dataclass(frozen=True)
class Restructured:
    """A smaller model, and which units of the model before are left in it."""

    model: nn.Module
    kept: Mapping[str, Any]


class Method(ABC):
    """A way to make a model smaller; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    needs_text: ClassVar[bool] = True

    def words(self, sparsity: float) -> str:
        """How much it removes when asked for a share, in a few words, such as "25%"."""
        return f"{100 * sparsity:g}%"

    def estimate(self, weights: int, work: Workload) -> Estimate:
        """What counts of its own work, beside the model and the one made of it, for so many weights in all blocks."""
        return Estimate()

    @abstractmethod
    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """Dimension -> float32 `[blocks, size]`, of the depth `[blocks]`; higher is kept."""

    @abstractmethod
    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """What stays when a share of the dimension goes, as `sparity.cut` takes it."""

    def restructure(self, subject: Subject, sparsity: float) -> Restructured:
        """The smaller model."""
        kept = self.choose(subject, sparsity)
        return Restructured(cut_model(subject.model, kept), kept)

    def config_changes(self, decoder: Decoder) -> dict[str, Any]:
        """The configuration's attributes that change besides the sizes.

        Raises:
            InvalidInput: the configuration cannot say what the method adds.
        """
        return {}

    def sizes_on_average(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """As `sizes`, about, where blocks will differ."""
        return self.sizes(decoder, sparsity)

    @abstractmethod
    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """Dimension -> how many units every block, or the model, will have; no weight is read.

        Raises:
            InvalidInput: blocks would differ, which no stock configuration can say.
        """


def trainable_as(dense: nn.Module, smaller: nn.Module) -> None:
    """Let the parameters of a smaller model need gradients where those of the dense one do, in place."""
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(dense.get_parameter(name).requires_grad)
