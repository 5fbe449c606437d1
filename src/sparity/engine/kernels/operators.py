"""The kernels as operators of PyTorch, their shapes known beforehand: `torch.compile` and others trace past them.

Eager code calls the kernels themselves, which costs less: an operator is dispatched in microseconds.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from sparity.engine.kernels import native
from sparity.engine.kernels.gemv.cpu import MOST_TOKENS
from sparity.engine.kernels.prepared import prepared_at
from sparity.engine.kernels.step import cpu
from sparity.formats import unpack
from sparity.products import panels as products


@torch.library.custom_op("sparity::multiply", mutates_args=())
def multiply(x: Tensor, handle: int, rows: int, columns: int) -> Tensor:
    """`x` [..., columns] -> `[..., rows]` in the type of `x`, by the prepared weight of this handle.

    A gradient reaches `x`.

    Raises:
        InvalidInput: the weight of this handle is gone.
    """
    prepared = prepared_at(handle)
    return prepared(x.to(prepared.packed.dtype)).to(x.dtype)


@multiply.register_fake
def _(x: Tensor, handle: int, rows: int, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("sparity::unpacked", mutates_args=())
def unpacked(like: Tensor, handle: int, rows: int, columns: int) -> Tensor:
    """The prepared weight of this handle, dense `[rows, columns]`, in the type of `like`.

    Raises:
        InvalidInput: the weight of this handle is gone.
    """
    packed = prepared_at(handle).packed
    dense = unpack(packed).to(like.dtype)
    return dense.clone() if packed.format == "dense" else dense  # an operator gives nothing that it was given


@unpacked.register_fake
def _(like: Tensor, handle: int, rows: int, columns: int) -> Tensor:
    return like.new_empty((rows, columns))


def _remember(ctx: Any, inputs: tuple[Tensor, int, int, int], output: Tensor) -> None:
    ctx.weight = inputs[1:]


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return gradient @ unpacked(gradient, *ctx.weight), None, None, None


multiply.register_autograd(_gradient, setup_context=_remember)


@torch.library.custom_op("sparity::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [..., columns] times a dense `weight` [rows, columns], both bfloat16 on the CPU -> `[..., rows]`.

    Few inputs are multiplied by the compiled kernel, where there is one, and many by PyTorch.
    """
    tokens, (rows, columns) = x.numel() // max(x.shape[-1], 1), weight.shape
    if native.unavailable() or not 0 < tokens <= MOST_TOKENS or not weight.is_contiguous():
        return products.linear(x, weight)
    x, out = x.contiguous(), x.new_empty((*x.shape[:-1], rows))
    matrix = native.Matrix(rows=rows, columns=columns, values=weight.data_ptr(), kept=weight.numel())
    native.library().sparity_gemv(
        ctypes.addressof(matrix), x.data_ptr(), out.data_ptr(), False, tokens, native.threads()
    )
    return out


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("sparity::attend", mutates_args=("keys", "values", "mass"))
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    mass: Tensor | None = None,
    fresh: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """`step.cpu.attend` for heads without norms: writes to the cache, and gives what is like `q`, contiguous.

    Raises:
        InvalidInput: there are no compiled kernels.
    """
    _, kv_heads, _, width = keys.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    heads = cpu.Heads(q.shape[1] // width, kv_heads, width, scale)
    tables, view = (cos.contiguous(), sin.contiguous()), cpu.CacheView(keys, values, lengths, mass)
    cpu.attend(heads, q.contiguous(), k.contiguous(), v.contiguous(), tables, view, out, fresh, visible)
    return out


@attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    mass: Tensor | None = None,
    fresh: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
