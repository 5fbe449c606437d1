"""Safetensors files written tensor by tensor: nothing but the tensor at hand need be in memory."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sparity.files import write_atomically

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ENTRY = 200  # bytes of a header that an entry needs beside its name, at most


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; each tensor is asked for once, in order.

    Raises:
        SparityError: the disk is full or the folder cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            _write(file, tensors, metadata)

    write_atomically(path, write)


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    room = len(json.dumps([header, list(tensors)])) + ENTRY * len(tensors)
    room += -room % 8  # the numbers behind it stay aligned
    file.seek(8 + room)
    offset = 0
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            file.write(flat.view(torch.uint8).numpy().data)
        shape = list(tensor.shape)
        header[name] = {"dtype": CODES[tensor.dtype], "shape": shape, "data_offsets": [offset, offset + flat.nbytes]}
        offset += flat.nbytes
    file.seek(0)
    file.write(room.to_bytes(8, "little"))
    file.write(json.dumps(header).encode().ljust(room))
    if not offset:  # seeking alone makes no file
        file.seek(0, os.SEEK_END)
        file.truncate(8 + room)
