"""Linear layers that the engine multiplies: with a packed weight, or with an ordinary dense one."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sparity.engine.kernels import operators
from sparity.engine.kernels.native_weight import declines
from sparity.engine.kernels.prepared import Prepared, prepare
from sparity.engine.modules.packed_matrix import HoldsMatrix
from sparity.engine.modules.packed_module import NOT_PICKLED
from sparity.errors import InvalidInput
from sparity.formats import Packed, unpack


class _Product(torch.autograd.Function):
    """x @ weight.T, whose gradient reaches x; the weight itself has none."""

    @staticmethod
    def forward(context: Any, x: Tensor, prepared: Prepared, alone: bool) -> Tensor:
        context.prepared = prepared
        product = prepared.each_alone if alone else prepared
        return product(x.to(prepared.packed.dtype)).to(x.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ unpack(context.prepared.packed).to(gradient.dtype), None, None


def multiply(x: Tensor, prepared: Prepared, alone: bool = False) -> Tensor:
    """`x` [..., columns], cast to the weight's type -> `[..., rows]` in the type of `x`; a gradient reaches `x`.

    `alone`: see `Prepared.each_alone`.
    """
    out: Tensor = _Product.apply(x, prepared, alone)  # type: ignore[no-untyped-call]
    return out


class PackedLinear(HoldsMatrix):
    """`x @ weight.T + bias` for a packed weight `[out, in]`, in place of an `nn.Linear` or a `Conv1D`.

    Inputs are cast to the weight's type.

    Attributes:
        transposed: whether the layer that it stands for keeps `[in, out]`.
    """

    bias: nn.Parameter | None

    def __init__(
        self, matrix: str, in_features: int, out_features: int, bias: nn.Parameter | None, transposed: bool = False
    ) -> None:
        super().__init__(matrix, out_features, in_features)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.register_parameter("bias", bias)

    def dense(self) -> dict[str, Tensor]:
        """See `HoldsMatrix.dense`."""
        found = super().dense()
        return {name: weight.T.contiguous() for name, weight in found.items()} if self.transposed else found

    def named(self, matrix: str) -> "PackedLinear":
        """A layer that keeps the same packed weight and bias under another name."""
        other = PackedLinear(matrix, self.in_features, self.out_features, self.bias, self.transposed)
        return other.share(self).stand_for(self)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> `[..., out]` in the type of `x`."""
        out: Tensor
        if torch.compiler.is_compiling():
            out = operators.multiply(x, self.prepared.handle, self.out_features, self.in_features)
        else:
            out = self._product(x)
        return out if self.bias is None else out + self.bias

    def _product(self, x: Tensor) -> Tensor:
        return multiply(x, self.prepared)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.held()}"


class DenseLinear(nn.Linear):
    """An `nn.Linear` in bfloat16 on the CPU whose products the engine's dense kernels compute.

    The weight stays an ordinary parameter: it is saved, tied, trained and moved as ever. Where the engine's kernels do
    not apply, and while gradients are recorded, PyTorch multiplies.
    """

    _held: "_Held"

    @classmethod
    def adopt(cls, layer: nn.Linear) -> None:
        """Turn `layer` into one, in place."""
        layer.__class__ = cls
        layer._held = _Held()  # type: ignore[assignment]  # an attribute, not a module

    def release(self) -> None:
        """Turn it back into an `nn.Linear`, in place."""
        del self._held
        self.__class__ = nn.Linear  # type: ignore[assignment]

    @property
    def prepared(self) -> Prepared | None:
        """The weight with what multiplies it; None where the compiled kernels do not apply."""
        return self._held.prepared(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> `[..., out]`."""
        out: Tensor
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or x.device.type != "cpu":
                return super().forward(x)
            out = operators.linear(x, self.weight)
            return out if self.bias is None else out + self.bias
        prepared = None if torch.is_grad_enabled() or x.dtype != torch.bfloat16 else self.prepared
        if prepared is None or x.device.type != "cpu":
            return super().forward(x)
        out = self._product(prepared, x)
        return out if self.bias is None else out + self.bias

    def _product(self, prepared: Prepared, x: Tensor) -> Tensor:
        return prepared(x)


class Head(DenseLinear):
    """A model's head: up to `prepared.MANY` inputs each get the product that they would get alone, bit for bit."""

    def _product(self, prepared: Prepared, x: Tensor) -> Tensor:
        return prepared.each_alone(x)


class _Held:
    """The prepared form of a parameter, made anew when the parameter has other memory; a copy starts empty."""

    def __init__(self) -> None:
        self._prepared: Prepared | None = None
        self._place: tuple[Any, ...] = (0,)

    def prepared(self, weight: Tensor) -> Prepared | None:
        if _place(weight) != self._place:
            packed = Packed("dense", (weight.shape[0], weight.shape[1]), weight.dtype, {"values": weight.detach()})
            usable = weight.device.type == "cpu" and weight.is_contiguous() and declines(packed) is None
            self._prepared = prepare(packed) if usable else None
            if self._prepared is not None:
                weight.data = self._prepared.packed.tensors["values"]  # on large pages, and in memory once
            self._place = _place(weight)
        return self._prepared

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Held":
        return _Held()

    def __getstate__(self) -> NoReturn:
        raise InvalidInput(NOT_PICKLED)


def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
