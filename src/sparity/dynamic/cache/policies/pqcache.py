"""PQCache: the tokens that a query finds by codes of their keys (Zhang et al. 2025, arXiv:2407.12820)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.cache.codebooks import codebooks, nearest, products
from sparity.dynamic.cache.policies.base import Reader
from sparity.dynamic.cache.seen import Reduce, Seen, reduced
from sparity.errors import InvalidInput
from sparity.registry import register


@register("cache.policy", "pqcache")
@dataclass(frozen=True)
class PQCache(Reader):
    """All tokens stay; the last query reads those to whose quantised keys it would pay most.

    Attributes:
        parts: into which a key is cut, each with centroids of its own.
        bits: of a code, 1 to 8: `2 ** bits` centroids.
        iterations: of k-means.
        group: how the query heads that share a key are taken together, `mean` or `max`.
        dense: the first layers of a model, which read everything.
    """

    parts: int = 2
    bits: int = 6
    iterations: int = 10
    group: Reduce = "mean"
    dense: int = 0

    @property
    def dense_layers(self) -> int:
        """See `Policy.dense_layers`."""
        return self.dense

    def score(self, seen: Seen) -> Tensor:
        """See `Policy.score`: the weight that the last query gives a token by its code."""
        found = torch.empty(seen.keys.shape[:3], device=seen.keys.device)
        for row, head in torch.cartesian_prod(*(torch.arange(count) for count in seen.keys.shape[:2])).tolist():
            keys = seen.keys[row, head]
            books = self.books(keys)
            queries = seen.grouped[row, head, :, -1]
            found[row, head] = self.weights(queries, nearest(keys, books), books, seen.scaling, seen.softcap)
        return found

    def books(self, keys: Tensor) -> Tensor:
        """Centroids of one head's keys `[tokens, width]`; see `codebooks`.

        Raises:
            InvalidInput: `parts` does not divide the width.
        """
        self.check_width(keys.shape[-1])
        return codebooks(keys, self.parts, self.bits, self.iterations)

    def check_width(self, width: int) -> None:
        """Refuse heads that cannot be cut; see `books`."""
        if width % self.parts:
            raise InvalidInput(
                f"pqcache: heads of {width} numbers cannot be cut into {self.parts} parts: change `parts`"
            )

    def weights(self, queries: Tensor, codes: Tensor, books: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """What one head's queries `[group, width]` together pay to tokens by their codes, float32 `[tokens]`."""
        logits = products(queries, codes, books) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return reduced(logits.softmax(-1), self.group, 0)
