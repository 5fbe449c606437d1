"""Methods that rank the parts of one dimension and keep the best: equally many in every block."""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.models.cuts.experts import top_k
from sparity.models.dimensions import CHANNELS, DEPTH, EXPERTS, HIDDEN, KV_GROUPS, QUERY_HEADS
from sparity.static.structure.methods.base import Choice, Method
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import best_of_groups, blocks_left, choose_rows, largest, left_of, rows_of


@dataclass(frozen=True)
class Ranked(Method):
    """A method whose scores alone decide; `dimension` says what is cut.

    `mlp_channels` are those of each expert where there are any. Heads are what a model shares keys and values by:
    `kv_groups`, or `query_heads` where each has its own; `query_heads` that share keys and values are ranked within
    their group, of which equally many stay.
    """

    dimension: str = CHANNELS
    multiple_of: int = 1

    @abstractmethod
    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        return choose(self.scores(subject), self.dimension, subject.decoder, sparsity, self.multiple_of)

    def sizes(self, decoder: Decoder, sparsity: float) -> dict[str, int]:
        """See `Method.sizes`."""
        return ranked_sizes(self.dimension, decoder, sparsity, self.multiple_of)


def choose(
    scores: dict[str, Tensor], dimension: str, decoder: Decoder, sparsity: float, multiple_of: int = 1
) -> Choice:
    """What stays of one dimension: the best by their scores."""
    wanted = [name for name in scores if name.partition(".")[0] == dimension]
    if not wanted:
        raise _no_such(dimension, scores)
    if dimension == DEPTH:
        return {DEPTH: largest(scores[DEPTH], blocks_left(len(decoder), sparsity)).tolist()}
    if dimension == HIDDEN:
        count = left_of(scores[HIDDEN].shape[1], sparsity, multiple_of)
        return {HIDDEN: largest(scores[HIDDEN][0], count).tolist()}
    if dimension == QUERY_HEADS and KV_GROUPS in scores:
        groups = int(decoder.config.num_key_value_heads)
        each = left_of(scores[QUERY_HEADS].shape[1] // groups, sparsity)
        return {
            QUERY_HEADS: [
                None if row is None else best_of_groups(row, groups, each).tolist()
                for row in rows_of(scores[QUERY_HEADS])
            ]
        }
    rows = {name: choose_rows(scores[name], sparsity, multiple_of) for name in wanted}
    if dimension == EXPERTS:
        ranked_sizes(EXPERTS, decoder, sparsity, multiple_of)  # refused where too few would be left
    return {name: [None if row is None else row.tolist() for row in found] for name, found in rows.items()}


def ranked_sizes(dimension: str, decoder: Decoder, sparsity: float, multiple_of: int = 1) -> dict[str, int]:
    """How many units of a dimension stay, by the shapes of a model alone."""
    config = decoder.config
    if dimension == DEPTH:
        return {DEPTH: blocks_left(len(decoder), sparsity)}
    if dimension == HIDDEN:
        return {HIDDEN: left_of(int(config.hidden_size), sparsity, multiple_of)}
    if dimension == EXPERTS:
        counts = {decoder.family.experts(config, index) for index in range(len(decoder))} - {0}
        if not counts:
            raise _no_such(EXPERTS, dict.fromkeys(_names(decoder)))
        left = left_of(counts.pop(), sparsity, multiple_of)
        if left < top_k(config):
            raise InvalidInput(
                f"experts: {left} would be left, but every token visits {top_k(config)}: lower the sparsity"
            )
        return {EXPERTS: left}
    found: dict[str, int] = {}
    for index in range(len(decoder)):
        for each in decoder.dimensions(index):
            if each.name.partition(".")[0] == dimension:
                found[each.name] = left_of(each.size, sparsity, multiple_of)
    groups = getattr(config, "num_key_value_heads", None)
    if not found and dimension == QUERY_HEADS and groups:
        heads = int(config.num_attention_heads)
        found[QUERY_HEADS] = left_of(heads // groups, sparsity) * groups
    if not found:
        raise _no_such(dimension, dict.fromkeys(_names(decoder)))
    return found


def _names(decoder: Decoder) -> list[str]:
    kinds = dict.fromkeys(d.name.partition(".")[0] for index in range(len(decoder)) for d in decoder.dimensions(index))
    return [*kinds, HIDDEN, DEPTH]


def _no_such(dimension: str, known: object) -> InvalidInput:
    offered = dict.fromkeys(name.partition(".")[0] for name in known)  # type: ignore[attr-defined]
    return InvalidInput(f'this model has no "{dimension}" that could be cut: it has {", ".join(offered)}')
