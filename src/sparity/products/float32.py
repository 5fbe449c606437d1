"""Forward and backward passes whose products of 16-bit matrices on the processor are float32 ones where that is faster.

Weights and everything between the products stay in their type, and every product's result is rounded to it once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparity.products import panels
from sparity.products.choice import emulated_types

aten = torch.ops.aten
COMPOSED = {aten.linear.default, aten.matmul.default}  # in inference mode they arrive whole


@contextmanager
def float32_products() -> Iterator[None]:
    """Within the context products of types that are emulated are computed in float32; attention's own kernel is not.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(64, 32).bfloat16(), torch.randn(16, 32).bfloat16()
        >>> with float32_products():
        ...     result = torch.nn.functional.linear(x, weight)
        >>> result.dtype, torch.allclose(result.float(), x.float() @ weight.float().T, rtol=2**-8)
        (torch.bfloat16, True)
    """
    types = emulated_types()
    if not types:
        yield
        return
    with _Float32Products(types):
        yield


class _Float32Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes the place of the products that autograd and modules arrive at, also on the way back."""

    def __init__(self, types: frozenset[torch.dtype]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._types = types

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSED:
            with self:
                return func.decompose(*args, **kwargs)
        compute = PRODUCTS.get(func)
        if compute is None or kwargs or not self._takes([x for x in args if isinstance(x, Tensor)]):
            return func(*args, **kwargs)
        return compute(*args)

    def _takes(self, operands: Sequence[Tensor]) -> bool:
        """Whether all are on the processor, and what is multiplied is of emulated types."""
        types = {x.dtype for x in operands if x.is_floating_point()}
        return len(types) == 1 and types <= self._types and all(x.device.type == "cpu" for x in operands)


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return panels.multiply(x, weight) if len(x) > panels.FEW else torch.mm(x, weight)


def _add_multiply(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return panels.multiply(x, weight, bias) if len(x) > panels.FEW else torch.addmm(bias, x, weight)


def _multiply_each(x: Tensor, y: Tensor) -> Tensor:
    """`x` [batch, n, k] times `y` [batch, k, m], some of the batch at a time."""
    out = x.new_empty(x.shape[0], x.shape[1], y.shape[2])
    most = max(1, panels.PANEL // max(1, (out.numel() + x.numel() + y.numel()) * 4 // len(x))) if len(x) else 1
    for begin in range(0, len(x), most):
        part = slice(begin, begin + most)
        out[part] = torch.bmm(x[part].float(), y[part].float())
    return out


def _add_multiply_each(bias: Tensor, x: Tensor, y: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], x.shape[1], y.shape[2])
    for place, added in enumerate(bias.expand_as(out)):
        out[place] = added + x[place].float() @ y[place].float()
    return out


def _multiply_groups(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """Experts: rows of `x` [tokens, k] times their own `y` [experts, k, m]; for `y` [tokens, m], columns of `x` [n,
    tokens] times the same rows of `y`, a matrix per expert. `ends` [experts] says where each one's tokens end."""
    shared = y.ndim == 3  # by the tokens: each has its expert
    out = x.new_zeros(len(x), y.shape[2]) if shared else x.new_zeros(len(ends), len(x), y.shape[1])
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        part = slice(begin, end)
        if shared:
            out[part] = _multiply(x[part], y[expert])
        else:
            out[expert] = _multiply(x[:, part], y[part])
        begin = end
    return out


PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    aten.mm.default: _multiply,
    aten.addmm.default: _add_multiply,
    aten.bmm.default: _multiply_each,
    aten.baddbmm.default: _add_multiply_each,
    aten._grouped_mm.default: _multiply_groups,
}
