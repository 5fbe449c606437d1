"""The operations between products, each by itself, by the compiled kernels; `sparity_step` is made of them.

All tensors are bfloat16, contiguous and on the CPU, which is not checked here.
"""

import ctypes
from dataclasses import dataclass

from torch import Tensor

from sparity.engine.kernels import native

WIDTHS = range(16, 513, 16)  # sizes of a head that attention takes


def rms_norm(x: Tensor, add: Tensor | None, weight: Tensor, epsilon: float, out: Tensor) -> None:
    """`x` [tokens, columns] becomes `x + add`, and `out` its norm; see `reference.rms_norm`."""
    tokens, columns = x.shape
    native.library().sparity_rms_norm(
        x.data_ptr(),
        add.data_ptr() if add is not None else None,
        weight.data_ptr(),
        epsilon,
        tokens,
        columns,
        out.data_ptr(),
        native.threads(),
    )


def gate(gates: Tensor, ups: Tensor, out: Tensor) -> None:
    """`out` becomes `silu(gates) * ups`; it may be one of them."""
    native.library().sparity_gate(gates.data_ptr(), ups.data_ptr(), gates.numel(), out.data_ptr(), native.threads())


@dataclass(frozen=True)
class Heads:
    """The heads of one layer: how many, their size, the scale of their scores, and the norm of each, if any."""

    heads: int
    kv_heads: int
    width: int
    scale: float
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    epsilon: float = 0.0


def attend(
    heads: Heads,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    length: int,
    visible: Tensor | None,
    out: Tensor,
) -> None:
    """Append `k` and `v` [tokens, kv_heads * width] to a cache and attend with `q` [tokens, heads * width].

    `keys` and `values` [tokens, kv_heads, capacity, width] hold `length` < capacity keys per token; `tables` are cos
    and sin [tokens, width]; `visible` uint8 [tokens, length + 1] or None; `out` is like `q`. See `reference.attend`.
    """
    matrix = native.Attention(
        tokens=q.shape[0],
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        width=heads.width,
        cos=tables[0].data_ptr(),
        sin=tables[1].data_ptr(),
        query_norm=None if heads.query_norm is None else heads.query_norm.data_ptr(),
        key_norm=None if heads.key_norm is None else heads.key_norm.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        capacity=keys.shape[2],
        length=length,
        visible=None if visible is None else visible.data_ptr(),
        scale=heads.scale,
        epsilon=heads.epsilon,
    )
    native.library().sparity_attend(
        ctypes.byref(matrix), q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), native.threads()
    )
