"""A packed matrix where the compiled kernels can read it: checked once, on large pages when it is large."""

import ctypes
import weakref
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from sparity.engine.kernels import native
from sparity.errors import InvalidInput
from sparity.formats import Packed, format_of
from sparity.formats.conversions.spread import SpreadSideBySide
from sparity.formats.storage.pairs_beside import PairsSideBySide
from sparity.formats.storage.side_by_side import DenseSideBySide, SideBySide
from sparity.formats.storage.values import aligned

TAKES = frozenset(  # (format, encoding)
    {
        *product(("dense", "bitmask", "two_of_four", "columns"), ("same", "int8")),
        *product(("dense", "bitmask", "two_of_four", "columns"), ("int4",)),
        ("block", "same"),
    }
)
CODES = {"dense": 0, "bitmask": 1, "two_of_four": 2, "block": 3, "columns": 4}  # of csrc/sparity_kernels.h
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LARGE = 1 << 21  # bytes of one large page
DENSEST_MASKED = {"avx512_bf16": 0.45}  # int4: the share of kept weights up to which masks are read faster than zeros
_NOTHING = torch.zeros(1)
_allocated: set[int] = set()  # addresses of the buffers on large pages
INT8_COLUMNS = 1 << 17  # beyond, sums of int8 products could leave int32


def declines(packed: Packed) -> str | None:
    """Why the compiled kernels do not take this matrix, or None when they do."""
    if reason := native.unavailable():
        return reason
    if packed.pair not in TAKES:
        return f"no kernel for {packed.words}"
    if packed.dtype != torch.bfloat16:
        return f"kernels take bfloat16, not {str(packed.dtype).removeprefix('torch.')}"
    if packed.format == "block" and packed.options["columns"] % 16:
        return "block kernels take blocks whose width is a multiple of 16"
    if packed.encoding.integer_products and packed.shape[1] >= INT8_COLUMNS:
        return f"{packed.encoding.name} kernels take fewer than {INT8_COLUMNS} columns"
    return None


class NativeWeight:
    """One weight, ready for `gemv.cpu` and `prefill.cpu`.

    `packed` holds its tensors, moved to large pages where that pays: drop the matrix that was given, so that the weight
    is in memory once.
    """

    def __init__(self, packed: Packed) -> None:
        """Check and move `packed`.

        Raises:
            InvalidInput: the kernels do not take it, see `declines`.
            CorruptFile: it contradicts itself.
        """
        if reason := declines(packed):
            raise InvalidInput(f"{packed.format} {packed.shape[0]} x {packed.shape[1]}: {reason}")
        format_of(packed).check(packed)
        parts, moved = _in_place(packed)
        self.packed = replace(packed, tensors=moved)
        # a null pointer may not even be moved by 0, so an empty tensor is given an address
        address = {name: part.data_ptr() or _NOTHING.data_ptr() for name, part in parts.items()}
        self._matrix = native.Matrix(
            rows=packed.shape[0],
            columns=packed.shape[1],
            values=address["values"],
            masks=address.get("masks"),
            offsets=address.get("offsets"),
            block_columns=address.get("columns"),
            scales=address["scales"] if packed.encoding.integer_products else None,
            block_rows=packed.options.get("rows", 0),
            block_width=packed.options.get("columns", 0),
            kept=len(parts["values"]),
            format=CODES["dense" if isinstance(moved, SpreadSideBySide) else packed.format],
        )
        if packed.encoding.half_bytes:
            self._add_groups(parts, address)
        self.address = ctypes.addressof(self._matrix)  # the pointer that each call hands over
        if packed.encoding.integer_products and not format_of(packed).by_channel:
            self._row_sums = torch.empty(packed.shape[0], dtype=torch.int32)
            native.library().sparity_row_sums(self.address, self._row_sums.data_ptr(), native.threads())
            self._matrix.row_sums = self._row_sums.data_ptr()

    def _add_groups(self, parts: Mapping[str, Tensor], address: Mapping[str, int]) -> None:
        """What the kernels read of half bytes in groups."""
        matrix = self._matrix
        matrix.group = self.packed.shape[1] // parts["scales"].shape[1]
        matrix.group_scales, matrix.zeros = address["scales"], address.get("zeros")
        if format_of(self.packed).by_channel:  # kernels read a group's scales of many rows at a time
            self._sides = [aligned(part.T.contiguous()) for part in self.packed.sides.values()]
            pointers = dict(zip(self.packed.sides, (side.data_ptr() for side in self._sides), strict=True))
            matrix.group_scales, matrix.zeros = pointers["scales"], pointers.get("zeros")
        matrix.scale_type = SCALE_TYPES[parts["scales"].dtype]
        if "offsets" in parts:  # of half bytes, more than there are bytes
            matrix.kept = int(parts["offsets"][-1])

    def __repr__(self) -> str:
        return f"NativeWeight({self.packed.format}, {self.packed.shape[0]} x {self.packed.shape[1]})"


def _in_place(packed: Packed) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Tensors of a matrix as kernels read them, where they stay; and the same as its format has them."""
    laid = _side_by_side(packed)
    if laid is None:
        moved = {name: on_large_pages(aligned(part)) for name, part in packed.tensors.items()}
        return moved, moved
    laid = laid.moved({name: on_large_pages(aligned(part)) for name, part in laid.laid.items()})
    return laid.laid, laid


def _side_by_side(packed: Packed) -> SideBySide | None:
    """The tensors with sixteen rows side by side, where kernels read them so."""
    if isinstance(packed.tensors, SideBySide):
        return packed.tensors
    if not packed.encoding.half_bytes:
        return None
    if packed.format == "dense":
        return DenseSideBySide.of(packed.tensors)
    if packed.format == "two_of_four":
        return PairsSideBySide.of(packed.tensors, *packed.shape)
    if packed.format == "bitmask":
        kept = int(packed.tensors["offsets"][-1]) / (packed.shape[0] * packed.shape[1])
        if kept > DENSEST_MASKED.get(native.instruction_set(), 0):
            return SpreadSideBySide.of(packed)
    return None


def on_large_pages(tensor: Tensor) -> Tensor:
    """A copy of a large tensor on 2 MB pages, where the system has them; a small one, or one there, as it is."""
    size = tensor.numel() * tensor.element_size()
    if size < LARGE or tensor.data_ptr() in _allocated:
        return tensor
    library = native.library()
    memory = library.sparity_allocate(size)
    if not memory:
        return tensor
    buffer = (ctypes.c_byte * size).from_address(memory)
    _allocated.add(memory)
    weakref.finalize(buffer, _free, memory, size).atexit = False  # a thread may still read at the end
    moved = torch.frombuffer(buffer, dtype=torch.uint8)  # keeps the buffer alive
    return moved.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _free(memory: int, size: int) -> None:
    _allocated.discard(memory)
    native.library().sparity_free(memory, size)
