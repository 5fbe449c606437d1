"""The header of a GGUF file, read strictly: nothing is believed that the file is too short for."""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sparity.errors import CorruptFile, InvalidInput

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, unless the file says otherwise
LARGEST_NUMBER = 2**27  # of the configuration: no model has a larger size or a longer context
SIMPLE = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
ADVICE = "fetch or convert it again"


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its shape in PyTorch's order, and its bytes."""

    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself; of a list, only how long it is."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.values["general.architecture"])


def read_header(path: Path) -> Header:
    """The checked header of a GGUF file.

    Raises:
        CorruptFile: the file is no GGUF, shorter than it says, or contradicts itself.
        InvalidInput: it cannot be opened, or is of a version or a type of tensor that is not known here.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CorruptFile(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}; {ADVICE}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).header()
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}") from error


class _Reader:
    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, len(MAGIC)

    def header(self) -> Header:
        version = self._number("<I")
        if version not in VERSIONS:
            raise InvalidInput(
                f"{self._path} is of GGUF version {version}, or written on a big-endian machine; versions "
                f"{' and '.join(map(str, VERSIONS))} are read: convert it again with a current llama.cpp"
            )
        tensors, values = self._number("<Q"), self._number("<Q")
        described = self._described(values)
        return Header(described, self._tensors(tensors, described))

    def _described(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):  # however large the count: the file ends before
            key = self._string()
            if key in found:
                raise self._corrupt(f"{key} is there twice")
            found[key] = self._value(self._number("<I"))
        architecture = found.get("general.architecture")
        if not isinstance(architecture, str):
            raise self._corrupt("it names no architecture (general.architecture)")
        for key, value in found.items():
            whole = isinstance(value, int) and key.startswith(f"{architecture}.")
            if whole and not 0 <= value <= LARGEST_NUMBER:
                raise self._corrupt(f"{key} is {value}, which no model has")
        return found

    def _value(self, kind: int) -> Any:
        if kind in SIMPLE:
            return self._number(SIMPLE[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise self._corrupt(f"a value of type {kind}, which GGUF does not have")
        element, count = self._number("<I"), self._number("<Q")
        if element in SIMPLE:
            self._skip(struct.calcsize(SIMPLE[element]) * count)
        elif element == STRING:
            for _ in range(count):
                self._skip(self._number("<Q"))
        else:
            raise self._corrupt(f"a list of values of type {element}, which no reader takes")
        return count

    def _tensors(self, count: int, described: Mapping[str, Any]) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        ends = []
        for _ in range(count):
            name = self._string()
            if name in found:
                raise self._corrupt(f"the tensor {name} is there twice")
            sides = self._number("<I")
            if not 1 <= sides <= 4:
                raise self._corrupt(f"the tensor {name} has {sides} dimensions")
            shape = tuple(self._number("<Q") for _ in range(sides))[::-1]
            size = self._size(name, shape, self._number("<I"))
            ends.append(self._number("<Q") + size)
            found[name] = Stored(shape, size)
        if not found:
            raise InvalidInput(f"{self._path} holds no tensors, only a vocabulary or metadata: give the whole model")
        alignment = described.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
            raise self._corrupt(f"its alignment is {alignment}")
        begin = -(-self._at // alignment) * alignment
        last, together = begin + max(ends), begin + sum(stored.size for stored in found.values())
        if max(last, together) > len(self._content):
            raise self._corrupt(
                f"it is truncated, or its tensors overlap: they need {max(last, together):,} bytes and the file has "
                f"{len(self._content):,}"
            )
        return found

    def _size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        """The bytes of a tensor."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise InvalidInput(
                f"{self._path}: {name} is quantised as type {kind}, which the installed gguf package does not know: "
                "update it (pip install -U gguf), or use a file of a common type such as Q8_0 or F16"
            ) from error
        if min(shape) < 1 or shape[-1] % block:
            raise self._corrupt(f"the tensor {name} of shape {list(shape)} cannot be cut into blocks of {block}")
        return prod(shape) // int(block) * int(size)

    def _number(self, form: str) -> Any:
        size = struct.calcsize(form)
        begin = self._at
        self._skip(size)
        return struct.unpack_from(form, self._content, begin)[0]

    def _string(self) -> str:
        begin = self._at + 8
        self._skip(self._number("<Q"))
        try:
            return self._content[begin : self._at].decode()
        except UnicodeDecodeError as error:
            raise self._corrupt(f"a name that is not UTF-8 at byte {begin}") from error

    def _skip(self, size: int) -> None:
        if size > len(self._content) - self._at:
            raise self._corrupt(f"it ends in the middle of its header, at byte {len(self._content):,}")
        self._at += size

    def _corrupt(self, words: str) -> CorruptFile:
        return CorruptFile(f"{self._path} is damaged: {words}; {ADVICE}")
