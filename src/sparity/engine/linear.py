"""A linear layer whose weight stays packed."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from sparity.engine.formats import Packed, unpack
from sparity.engine.kernels.prepared import Prepared, prepare


class _Product(torch.autograd.Function):
    """x @ weight.T, whose gradient reaches x; the weight itself has none."""

    @staticmethod
    def forward(context: Any, x: Tensor, prepared: Prepared) -> Tensor:
        context.prepared = prepared
        return prepared(x.to(prepared.packed.dtype)).to(x.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ unpack(context.prepared.packed).to(gradient.dtype), None


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` for a packed weight `[out, in]`, in place of an `nn.Linear` or a `Conv1D`.

    The weight is no parameter: it cannot be trained, moved to another device or cast. Inputs are cast to its type.

    Attributes:
        matrix: the name under which the checkpoint keeps the weight.
        transposed: whether the layer that it stands for keeps `[in, out]`.
    """

    def __init__(
        self, matrix: str, in_features: int, out_features: int, bias: nn.Parameter | None, transposed: bool = False
    ) -> None:
        super().__init__()
        self.matrix, self.transposed = matrix, transposed
        self.in_features, self.out_features = in_features, out_features
        self.bias = bias
        self._prepared: Prepared | None = None

    def give(self, packed: Packed) -> None:
        """Set the weight.

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
        """The dense weight `[out, in]`, unpacked anew each time; while a model is loaded, one without memory."""
        if self._prepared is None:
            return torch.empty(self.out_features, self.in_features, device="meta")
        return unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> `[..., out]` in the type of `x`."""
        assert self._prepared is not None, "a packed checkpoint is loaded as a whole"
        out: Tensor = _Product.apply(x, self._prepared)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLinear":
        """A layer of its own that reads the same packed weight, which nothing changes."""
        copied = PackedLinear(
            self.matrix, self.in_features, self.out_features, deepcopy(self.bias, memo), self.transposed
        )
        copied._prepared = self._prepared
        memo[id(self)] = copied
        return copied.train(self.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        held = "no weight yet" if self._prepared is None else f"{self.packed.format}, {self.packed.nbytes:,} bytes"
        return f"in_features={self.in_features}, out_features={self.out_features}, {held}"
