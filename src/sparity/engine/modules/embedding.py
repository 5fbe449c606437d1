"""An embedding whose weight is packed: only the rows that are asked for are decoded."""

import torch
from torch import Tensor

from sparity.engine.kernels.prepared import Prepared, prepare
from sparity.engine.modules.linear import PackedLinear, multiply
from sparity.engine.modules.packed_module import HoldsPacked
from sparity.formats import Packed, unpack
from sparity.formats.storage.nibbles import widen

FORMAT = "dense"  # in which a row lies by itself


class PackedEmbedding(HoldsPacked):
    """`weight[ids]` for a packed weight `[num_embeddings, embedding_dim]`, in place of an `nn.Embedding`.

    The weight is no parameter: it cannot be trained, moved to another device or cast. A `state_dict` has it dense.

    Attributes:
        matrix: the name under which the checkpoint keeps the weight.
    """

    weights = ("weight",)

    def __init__(self, matrix: str, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.matrix, self.num_embeddings, self.embedding_dim = matrix, num_embeddings, embedding_dim
        self._prepared: Prepared | None = None

    def give(self, packed: Packed) -> None:
        """Set the weight, in the format `dense`.

        Raises:
            CorruptFile: it contradicts itself.
        """
        self._prepared = prepare(packed)

    @property
    def packed(self) -> Packed:
        """The weight as it lies in memory, once."""
        assert self._prepared is not None, "a packed checkpoint is loaded as a whole"
        return self._prepared.packed

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked anew each time; while a model is loaded, one without memory."""
        if self._prepared is None:
            return torch.empty(self.num_embeddings, self.embedding_dim, device="meta")
        return unpack(self.packed)

    def dense(self) -> dict[str, Tensor]:
        """See `HoldsPacked.dense`."""
        return {} if self._prepared is None else {"weight": self.weight}

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` [...] -> `[..., embedding_dim]`."""
        packed = self.packed
        found = {name: tensor.index_select(0, ids.reshape(-1)) for name, tensor in packed.tensors.items()}
        values = found.pop("values")
        if packed.encoding.half_bytes:
            values = widen(values, self.embedding_dim)
        return packed.encoding.decode(values, found, packed.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        held = (
            "no weight yet" if self._prepared is None else f"{self.packed.encoding.name}, {self.packed.nbytes:,} bytes"
        )
        return f"{self.num_embeddings}, {self.embedding_dim}, {held}"


class PackedHead(PackedLinear):
    """A packed head: up to `prepared.MANY` inputs each get the product that they would get alone, bit for bit."""

    def give_from(self, embedding: PackedEmbedding) -> None:
        """Take the weight of an embedding, which stays in memory once."""
        self._prepared = embedding._prepared

    def _product(self, x: Tensor) -> Tensor:
        return multiply(x, self.prepared, alone=True)
