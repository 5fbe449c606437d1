"""The operations between products, each by itself, by the compiled kernels; `sparity_step` is made of them.

All tensors are bfloat16, contiguous and on the CPU, which is not checked here.
"""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sparity.engine.kernels import native
from sparity.errors import InvalidInput

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


class CacheView(NamedTuple):
    """Where the library reads and writes the keys and values of one layer: `SparityCache`.

    Attributes:
        keys: and `values`, bfloat16 `[rows, kv_heads, capacity, width]`, contiguous.
        lengths: keys that are there before the new ones, int64 `[rows, kv_heads]`.
        mass: float32 `[rows, kv_heads, capacity]`, to which the attention that each key gets is added; None = unwanted.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    mass: Tensor | None = None

    def write(self, cache: native.Cache) -> None:
        """Fill in the library's structure; this view must outlive its use."""
        cache.keys, cache.values = self.keys.data_ptr(), self.values.data_ptr()
        cache.lengths, cache.capacity = self.lengths.data_ptr(), self.keys.shape[2]
        cache.mass = None if self.mass is None else self.mass.data_ptr()


def attend(
    heads: Heads,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    cache: CacheView,
    out: Tensor,
    fresh: Tensor | None = None,
    visible: Tensor | None = None,
) -> None:
    """Append `k` and `v` [tokens, kv_heads * width] to a cache and attend with `q` [tokens, heads * width].

    Args:
        heads: what the tensors hold.
        q: and `k`, `v`: the new tokens of all rows, row by row.
        tables: cos and sin `[tokens, width]`.
        cache: with room for the new tokens; its lengths stay what they are.
        out: like `q`. See `reference.attend`.
        fresh: new tokens of each row, int64 `[rows]`, which see each other causally; None = one each.
        visible: uint8 `[rows, keys]`, 0 for keys that no token of the row sees; None, and keys beyond: seen.

    Raises:
        InvalidInput: the library does not know the cache's type.
    """
    matrix = native.Attention(
        rows=cache.keys.shape[0],
        tokens=q.shape[0],
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        width=heads.width,
        fresh=None if fresh is None else fresh.data_ptr(),
        cos=tables[0].data_ptr(),
        sin=tables[1].data_ptr(),
        query_norm=None if heads.query_norm is None else heads.query_norm.data_ptr(),
        key_norm=None if heads.key_norm is None else heads.key_norm.data_ptr(),
        visible=None if visible is None else visible.data_ptr(),
        visible_keys=0 if visible is None else visible.shape[1],
        scale=heads.scale,
        epsilon=heads.epsilon,
    )
    cache.write(matrix.cache)
    if native.library().sparity_attend(
        ctypes.byref(matrix), q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), native.threads()
    ):
        raise InvalidInput(f"attend: the library refused a cache in {cache.keys.dtype}")
