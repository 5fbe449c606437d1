"""A packed matrix on a GPU where Triton's kernels can read it: checked once, moved once."""

from itertools import product

import torch
from torch import Tensor

from sparity.engine.kernels import gpu
from sparity.errors import InvalidInput
from sparity.formats import Packed, format_of
from sparity.formats.storage import tiles
from sparity.formats.storage.values import dtype_name

TAKES = frozenset(product(("bitmask", "block", "columns"), ("same", "int8")))  # (format, encoding)
LARGEST_BLOCK = 128  # a side; larger blocks leave no registers


def declines(packed: Packed, device: torch.device | str = "cuda") -> str | None:
    """Why Triton's kernels do not take this matrix on `device`, or None when they do."""
    if packed.pair not in TAKES:
        return f"no Triton kernel for {packed.words}"
    if packed.format == "block" and max(packed.options.values()) > LARGEST_BLOCK:
        return f"Triton's block kernel takes blocks of at most {LARGEST_BLOCK} x {LARGEST_BLOCK}"
    return gpu.unavailable(torch.device(device))


class TritonWeight:
    """One weight in `bitmask`, `block` or `columns` that can be called with inputs.

    Attributes:
        shape: rows (outputs) and columns (inputs).
        dtype: the type of inputs and outputs.
        quantized: whether values are int8 with a scale per row.
        part: the packed tensors on the device, by name; for `bitmask` also `starts`, int32 `[tiles, groups]`: where the
            values of a group begin within its tile, 4 bytes per group of 256 weights. Without int8, `scales` is empty.
        device: where they are.
    """

    def __init__(self, packed: Packed, device: torch.device | str = "cuda") -> None:
        """Check `packed` and copy it to `device`.

        Raises:
            InvalidInput: the kernels do not take it, see `declines`.
            CorruptFile: it contradicts itself.
        """
        if reason := declines(packed, device):
            raise InvalidInput(f"{packed.format} {packed.shape[0]} x {packed.shape[1]}: {reason}")
        format_of(packed).check(packed)
        self.format, self.shape, self.dtype = packed.format, packed.shape, packed.dtype
        self.options, self.quantized = packed.options, packed.quantized
        self.device = torch.device(device)
        parts = {"scales": torch.empty(0), **packed.tensors}
        if packed.format == "bitmask":
            parts["starts"] = group_starts(packed.tensors["masks"])
        self.part = {name: tensor.to(self.device) for name, tensor in parts.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [tokens, columns] in the weight's type, on its device -> `[tokens, rows]`.

        Sums are float32; int8 weights as in `gemv.reference.gemv_scaled`.

        Raises:
            InvalidInput: shapes or types that do not fit.
        """
        # the kernels need Triton, which a machine without a GPU may lack
        if self.format == "block":
            from sparity.engine.kernels.block.triton import multiply

            return multiply(self, x)
        if self.format == "columns":
            from sparity.engine.kernels.skip import triton as skipping

            return torch.cat([skipping.gemv(self, some) for some in torch.split(x, skipping.MOST_TOKENS)])
        from sparity.engine.kernels.gemv import triton as few
        from sparity.engine.kernels.prefill import triton as many

        return few.gemv(self, x) if len(x) <= few.MOST_TOKENS else many.prefill(self, x)

    def __repr__(self) -> str:
        return f"TritonWeight({self.format}, {self.shape[0]} x {self.shape[1]}, {self.device})"

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.part.values())

    def check_inputs(self, x: Tensor) -> None:
        """Raise `InvalidInput` unless `x` is `[tokens, columns]` in the weight's type on its device."""
        fits = x.dim() == 2 and x.shape[-1] == self.shape[1] and x.dtype == self.dtype
        if not fits or x.device.type != self.device.type:
            raise InvalidInput(
                f"{self!r}: {dtype_name(self.dtype)} inputs [tokens, {self.shape[1]}] are needed there, not "
                f"{list(x.shape)} in {dtype_name(x.dtype)} on {x.device}"
            )


def group_starts(masks: Tensor) -> Tensor:
    """`masks` uint8 [tiles, groups, 4, 8] -> int32 `[tiles, groups]`: kept weights of the tile before each group."""
    count, groups = masks.shape[:2]
    kept = tiles.kept_per_tile(masks.reshape(count * groups, 1, *masks.shape[2:])).view(count, groups)
    return (kept.cumsum(1) - kept).to(torch.int32)
