"""A packed weight with the back end that multiplies it."""

from torch import Tensor

from sparity.engine.formats import Packed
from sparity.engine.kernels.gemv import cpu, pytorch
from sparity.engine.kernels.native_weight import NativeWeight, declines
from sparity.engine.kernels.prefill.cpu import prefill


class Prepared:
    """A weight that can be called with inputs.

    Attributes:
        packed: the weight as it lies in memory, once.
        native: the same where the compiled kernels read it; None when they do not run.
        declined: why the compiled kernels do not run, or None when they do.
    """

    def __init__(self, packed: Packed) -> None:
        self.declined = declines(packed)
        self.native = None if self.declined else NativeWeight(packed)
        self.packed = self.native.packed if self.native else packed

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., columns] in the weight's type -> `[..., rows]`."""
        rows = x.reshape(-1, x.shape[-1])
        if self.native is None:
            out = pytorch.gemv(self.packed, rows)
        elif len(rows) <= cpu.MOST_TOKENS:
            out = cpu.gemv(self.native, rows)
        else:
            out = prefill(self.native, rows)
        return out.reshape(*x.shape[:-1], self.packed.shape[0])


def prepare(packed: Packed) -> Prepared:
    """Make a packed weight ready to multiply.

    Raises:
        CorruptFile: it contradicts itself.
    """
    return Prepared(packed)
