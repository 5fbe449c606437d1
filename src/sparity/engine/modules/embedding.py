"""An embedding and a head whose weights are packed; of the embedding only the rows that are asked for are decoded."""

from typing import Any, Self

from torch import Tensor

from sparity.engine.modules.linear import PackedLinear, multiply
from sparity.engine.modules.packed_matrix import HoldsMatrix
from sparity.formats.storage.nibbles import widen

FORMAT = "dense"  # in which a row lies by itself


class PackedEmbedding(HoldsMatrix):
    """`weight[ids]` for a packed weight `[num_embeddings, embedding_dim]` in place of an `nn.Embedding`.

    The weight is in the format `FORMAT`.
    """

    def __init__(self, matrix: str, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(matrix, num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    @classmethod
    def like(cls, embedding: Any, matrix: str) -> Self:
        """One for the place of an `nn.Embedding`, still without a weight."""
        return cls(matrix, embedding.num_embeddings, embedding.embedding_dim).stand_for(embedding)

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` [...] -> `[..., embedding_dim]`."""
        packed = self.packed
        found = packed.rows_of(ids.reshape(-1))
        values = found.pop("values")
        if packed.encoding.half_bytes:
            values = widen(values, self.embedding_dim)
        return packed.encoding.decode(values, found, packed.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.held()}"


class PackedHead(PackedLinear):
    """A packed head: up to `prepared.MANY` inputs each get the product that they would get alone, bit for bit."""

    @classmethod
    def like(cls, head: Any, matrix: str) -> Self:
        """One for the place of an `nn.Linear`, still without a weight."""
        return cls(matrix, head.in_features, head.out_features, head.bias).stand_for(head)

    def _product(self, x: Tensor) -> Tensor:
        return multiply(x, self.prepared, alone=True)
