"""Safetensors files: written tensor by tensor, with nothing but that in memory; their headers read strictly."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sparity.errors import CorruptFile
from sparity.files import write_atomically, write_json

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ENTRY = 200  # bytes of a header that an entry needs beside its name, at most
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself takes no more
LARGEST_SIDE = 2**63 - 1  # beyond, a shape cannot even be said to PyTorch


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name that are made when they are asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, align: int = 8
) -> None:
    """Write a safetensors file atomically; each tensor is asked for once, in order.

    Args:
        path: of the file.
        tensors: by name.
        metadata: of the header.
        align: the first tensor begins at a multiple of so many bytes, itself one of 8.

    Raises:
        SparityError: the disk is full or the folder cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            _write(file, tensors, metadata, align)

    write_atomically(path, write)


def shard_name(stem: str, number: int, total: int) -> str:
    """The file of shard `number` of `total`, counted from 1, of weights called `stem`."""
    return f"{stem}-{number:05d}-of-{total:05d}.safetensors"


def write_index(path: Path, homes: Mapping[str, str], total_size: int) -> None:
    """Write the index of a checkpoint: every tensor's shard, and how many bytes they are together."""
    write_json(path, {"metadata": {"total_size": total_size}, "weight_map": dict(homes)})


def check_header(path: Path) -> None:
    """Refuse what a safetensors reader lets pass: a name that is there twice, a side that no tensor can have, no file.

    Raises:
        CorruptFile: one of these, or no readable header.
    """
    if not os.path.isfile(path):  # False for a device or a pipe, and for a name that no file can have
        raise CorruptFile(f"{path} is missing or no ordinary file; fetch it again")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(LONGEST_HEADER, path.stat().st_size - 8):
                raise ValueError(f"its header would take {length} bytes")
            header = unique_json(file.read(length))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        if any(side > LARGEST_SIDE for shape in shapes for side in shape):
            raise ValueError("a shape is beyond all bounds")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"{path} is truncated or damaged ({error}); fetch or save it again") from error


def unique_json(text: str | bytes) -> Any:
    """What a JSON text holds; a key that an object has twice, which readers settle in their own ways, is an error.

    Raises:
        ValueError, RecursionError: no JSON, or such a key.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is there twice")
    return found


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, align: int) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    room = len(json.dumps([header, list(tensors)])) + ENTRY * len(tensors)
    room += -(8 + room) % align  # the numbers behind it stay aligned
    file.seek(8 + room)
    offset = 0
    for name in tensors:
        tensor = tensors[name]
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            file.write(flat.view(torch.uint8).numpy().data)
        shape = list(tensor.shape)
        header[name] = {"dtype": CODES[tensor.dtype], "shape": shape, "data_offsets": [offset, offset + flat.nbytes]}
        offset += flat.nbytes
        del tensor, flat  # before the next one is made
    file.seek(0)
    file.write(room.to_bytes(8, "little"))
    file.write(json.dumps(header).encode().ljust(room))
    if not offset:  # seeking alone makes no file
        file.seek(0, os.SEEK_END)
        file.truncate(8 + room)
