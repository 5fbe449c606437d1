"""What methods that remove whole experts share: the same number goes in every block that has experts."""

from dataclasses import dataclass

from sparity.models import Decoder
from sparity.models.dimensions import EXPERTS
from sparity.static.structure.methods.base import Choice, Method
from sparity.static.structure.ranked import choose, ranked_sizes
from sparity.static.structure.subject import Subject


@dataclass(frozen=True)
class ExpertMethod(Method):
    """A method that keeps the experts of the highest scores: all but `int(experts * sparsity)` of every block."""

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        self.sizes(subject.decoder, sparsity)
        return choose(self.scores(subject), EXPERTS, subject.decoder, sparsity)

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        return ranked_sizes(EXPERTS, decoder, sparsity)
