"""What a format is, and the checks that stand between a file and a kernel."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparity import registry
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats.encodings.base import Encoding, EncodingSpec, build_encoding
from sparity.formats.storage.nibbles import narrow, widen
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.values import FLOATS, dtype_name, nonzero

VALUES = "values"  # the tensor of every format whose type is the encoding's
LARGEST_SIDE = 2**31 - 1
LARGEST_MATRIX = 2**32  # weights; a few bytes from a stranger may not ask for all memory there is
Layout = dict[str, tuple[torch.dtype, tuple[int | None, ...]]]


class Format(ABC):
    """A way to store the weights that are kept; a frozen dataclass whose fields are the format's options.

    The law: `unpack(pack(weight))` equals the weight bit for bit, where a weight counts as kept when its bits differ
    from +0. With values in another encoding it equals the weight that the encoding gives back.
    """

    name: ClassVar[str]
    by_channel: ClassVar[bool] = False  # made for inputs that are zero, not for weights: chosen by its name only

    # ---- what each format writes

    @abstractmethod
    def layout(self, rows: int, columns: int, stored: torch.dtype) -> Layout:
        """Name -> type and shape of each tensor; None stands for the number of things that are kept."""

    @abstractmethod
    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """`values` [rows, columns], as an encoding stores them -> the tensors of `layout`."""

    @abstractmethod
    def decode(self, packed: Packed) -> Tensor:
        """The inverse of `encode`, for tensors that `check` has passed."""

    @abstractmethod
    def check_content(self, packed: Packed) -> None:
        """Raise `CorruptFile` unless offsets, indices and masks agree with each other and with the shape."""

    def count(self, values: Tensor) -> int:
        """How many things of `values` [rows, columns], as they are stored, are kept: what `nbytes` asks for."""
        return int(torch.count_nonzero(nonzero(values)))

    def listed(self, packed: Packed) -> int:
        """How many values are kept, told from the other tensors; for formats that store a plain list of them."""
        raise NotImplementedError

    def matches(self, weight: Tensor) -> bool:
        """Whether the format can hold the mask of `weight` [rows, columns]."""
        return True

    # ---- what all share

    @property
    def options(self) -> dict[str, int]:
        """The format's own numbers, by name."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def pack(self, weight: Tensor, values: EncodingSpec = "same") -> Packed:
        """`weight` [rows, columns] in float32, float16 or bfloat16 -> packed, its values in the encoding `values`.

        Raises:
            InvalidInput: no such matrix or encoding, a mask that this format cannot hold, or numbers that the encoding
                cannot express.
        """
        check_weight(weight)
        encoding, weight = build_encoding(values), weight.detach().cpu().contiguous()
        return self.wrap(*encoding.encode(weight), weight.dtype, encoding)

    def wrap(self, stored: Tensor, sides: Mapping[str, Tensor], dtype: torch.dtype, encoding: Encoding) -> Packed:
        """Values as they will be stored `[rows, columns]`, and the encoding's side tensors -> packed.

        Raises:
            InvalidInput: a mask that this format cannot hold.
        """
        if not self.matches(stored):
            raise InvalidInput(self.refusal(stored))
        tensors = {**self.encode(stored), **sides}
        if encoding.half_bytes:
            tensors[VALUES] = narrow(tensors[VALUES])
        return Packed(self.name, (stored.shape[0], stored.shape[1]), dtype, tensors, self.options, encoding)

    def refusal(self, weight: Tensor) -> str:
        """Why `weight` does not match, and what to do."""
        return f"{self.name} cannot hold the mask of this weight of {weight.shape[0]} x {weight.shape[1]}: use bitmask"

    def unpack(self, packed: Packed) -> Tensor:
        """The weight `[rows, columns]`, as it was packed.

        Raises:
            CorruptFile: the tensors contradict each other; nothing beyond their ends is read.
        """
        self.check(packed)
        return packed.encoding.decode(self.stored(packed), packed.sides, packed.dtype)

    def stored(self, packed: Packed) -> Tensor:
        """The values `[rows, columns]` as the encoding stores them, one in each number; for what `check` has passed."""
        return self.decode(self._widened(packed))

    def nbytes(self, shape: tuple[int, int], kept: int, dtype: torch.dtype, values: EncodingSpec = "same") -> int:
        """Bytes that a matrix of `shape` would take, without packing it; `kept` is what `count` counts."""
        encoding, total = build_encoding(values), 0
        for name, (kind, sides) in self._full_layout(*shape, dtype, encoding).items():
            known = -(-kept // 2) if name == VALUES and encoding.half_bytes and sides[-1] is None else kept
            total += prod(known if side is None else side for side in sides) * kind.itemsize
        return total

    def check(self, packed: Packed) -> None:
        """Everything that a kernel relies on.

        Raises:
            CorruptFile: names, types, shapes or contents of the tensors are not what the format says.
        """
        if packed.format != self.name or dict(packed.options) != self.options:
            raise CorruptFile(f"a matrix in the format {packed.format} was given to {self.name}")
        rows, columns = packed.shape
        if packed.dtype not in FLOATS or not (0 < rows <= LARGEST_SIDE and 0 < columns <= LARGEST_SIDE):
            raise CorruptFile(f"{self.name}: a weight of {rows} x {columns} in {dtype_name(packed.dtype)} cannot be")
        check_size(self.name, rows, columns)
        layout = self._full_layout(rows, columns, packed.dtype, packed.encoding)
        if packed.tensors.keys() != layout.keys():
            raise CorruptFile(f"{self.name}: expected the tensors {sorted(layout)}, found {sorted(packed.tensors)}")
        for name, (dtype, sides) in layout.items():
            _check_tensor(f"{self.name}, tensor {name}", packed.tensors[name], dtype, sides)
        wide = self._widened(packed)
        packed.encoding.check(self.name, wide.tensors[VALUES], packed.sides)
        self.check_content(wide)

    def _full_layout(self, rows: int, columns: int, dtype: torch.dtype, encoding: Encoding) -> Layout:
        layout = self.layout(rows, columns, encoding.stored(dtype))
        if encoding.half_bytes:
            *others, last = layout[VALUES][1]
            layout[VALUES] = (torch.uint8, (*others, None if last is None else -(-last // 2)))
        return {**layout, **encoding.side_tensors(rows, columns)}

    def _widened(self, packed: Packed) -> Packed:
        """The same with one value in each number.

        Raises:
            CorruptFile: more or fewer values than the other tensors tell of, or one behind the last.
        """
        if not packed.encoding.half_bytes:
            return packed
        values, last = packed.tensors[VALUES], self.layout(*packed.shape, torch.int8)[VALUES][1][-1]
        count = self.listed(packed) if last is None else last
        if values.shape[-1] != -(-count // 2):
            raise CorruptFile(f"{self.name}: {count} values are kept, but {2 * values.shape[-1]} are stored")
        if count % 2 and bool((values[..., -1] >> 4).any()):
            raise CorruptFile(f"{self.name}: a value is stored behind the last of {count}")
        return replace(packed, tensors={**packed.tensors, VALUES: widen(values, count)})


def build_format(spec: str | Mapping[str, Any]) -> Format:
    """A format from its name, `bitmask`, or from name and options, `{block: {rows: 16, columns: 16}}`."""
    found: Format = registry.build("format", spec)
    return found


def format_of(packed: Packed) -> Format:
    """The format that a packed matrix is in, with its options.

    Raises:
        InvalidInput: no such format or option.
    """
    found: Format = registry.create("format", packed.format, packed.options)
    return found


def unpack(packed: Packed) -> Tensor:
    """The weight `[rows, columns]` of a packed matrix, whatever its format; see `Format.unpack`."""
    return format_of(packed).unpack(packed)


def check_weight(weight: Tensor) -> None:
    """Raise `InvalidInput` unless `weight` is a matrix that can be packed."""
    if weight.dtype not in FLOATS or weight.dim() != 2 or weight.layout != torch.strided or not weight.numel():
        known = ", ".join(map(dtype_name, FLOATS))
        raise InvalidInput(
            f"a weight to pack is a dense, non-empty matrix in {known}, not {list(weight.shape)} in "
            f"{dtype_name(weight.dtype)} ({dtype_name(weight.layout)})"  # type: ignore[arg-type]
        )


def check_size(what: str, rows: int, columns: int) -> None:
    """Raise `CorruptFile` when a matrix is larger than any that is read."""
    if rows * columns > LARGEST_MATRIX:
        raise CorruptFile(
            f"{what}: {rows} x {columns} is more than the {LARGEST_MATRIX} weights that a matrix may have"
        )


def check_offsets(what: str, offsets: Tensor, total: int) -> None:
    """Raise `CorruptFile` unless int64 `offsets` [n + 1] start at 0, never fall and end at `total`."""
    if int(offsets[0]) != 0 or int(offsets[-1]) != total or bool((offsets[1:] < offsets[:-1]).any()):
        raise CorruptFile(f"{what}: offsets must rise from 0 to the {total} that are stored")


def check_sorted(what: str, keys: Tensor, starts: Tensor, limit: int) -> None:
    """Raise `CorruptFile` unless `keys` [kept] lie in [0, limit) and rise strictly within each run.

    `starts` [kept] is True where a new run begins.
    """
    if keys.numel() == 0:
        return
    if int(keys.min()) < 0 or int(keys.max()) >= limit:
        raise CorruptFile(f"{what}: an index lies outside 0..{limit - 1}")
    if bool(((keys[1:] <= keys[:-1]) & ~starts[1:]).any()):
        raise CorruptFile(f"{what}: the indices of a row must rise, none twice")


def _check_tensor(what: str, tensor: Tensor, dtype: torch.dtype, sides: tuple[int | None, ...]) -> None:
    fits = tensor.dim() == len(sides) and all(
        side is None or side == found for side, found in zip(sides, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        wanted = ["any" if side is None else side for side in sides]
        raise CorruptFile(
            f"{what}: expected {dtype_name(dtype)} {wanted}, found {dtype_name(tensor.dtype)} {list(tensor.shape)}"
        )
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise CorruptFile(f"{what}: must be contiguous in the processor's memory")
