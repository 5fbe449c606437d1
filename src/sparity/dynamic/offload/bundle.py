"""A file of records: all that is loaded for a unit lies together, and units that tokens need often lie side by side.

    records   [units, width]                 of a neuron its rows of gate, up and its column of down, one after another
    order     int64 [units]                  which unit each record is
    trace     uint8 [tokens, ceil(units / 8)]   bit j of byte b: whether unit 8 b + j counted for a calibration token

The records begin on a page. The header's metadata names the model and the block that the file belongs to.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparity.checkpoints.shards import CODES, check_header, write_tensors
from sparity.dynamic.offload.slots import Units
from sparity.errors import CorruptFile

KEY = "sparity-offload"
PAGE = 4096
AGAIN = "write it again with sparity offload"


@dataclass(frozen=True)
class Bundle:
    """An open file's layout.

    Attributes:
        path: of the file.
        widths: of the parts of a record, in numbers.
        dtype: of the numbers.
        offset: where the records begin.
        order: `[units]`, see above.
        trace: bool `[tokens, units]`; no tokens where none were given.
    """

    path: Path
    widths: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    order: Units
    trace: NDArray[np.bool_]

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.order)

    @property
    def record_bytes(self) -> int:
        """Of one unit."""
        return sum(self.widths) * self.dtype.itemsize

    @cached_property
    def place_of(self) -> Units:
        """`[units]`: where each unit's record is, counted in records."""
        return np.argsort(self.order)

    @cached_property
    def frequency(self) -> NDArray[np.float64]:
        """`[units]`: the share of calibration tokens for which each counts; all alike where there is no trace."""
        found: NDArray[np.float64] = self.trace.mean(0) if len(self.trace) else np.ones(self.units)
        return found


def write_bundle(path: Path, parts: Sequence[Tensor], trace: Tensor | None, identity: Mapping[str, Any]) -> None:
    """Write a bundle atomically, the units that count most often first.

    Args:
        path: of the file.
        parts: `[units, width]` each.
        trace: bool `[tokens, units]`; None = nothing is known.
        identity: of the model and the block.

    Raises:
        SparityError: the disk is full or the folder cannot be written.
    """
    units = len(parts[0])
    order = torch.arange(units) if trace is None else trace.sum(0).argsort(descending=True, stable=True)
    bits = np.zeros((0, -(-units // 8)), np.uint8)
    if trace is not None:
        bits = np.packbits(trace.numpy(), axis=1, bitorder="little")
    tensors = {
        "records": torch.cat([part[order] for part in parts], 1),
        "order": order,
        "trace": torch.from_numpy(bits),
    }
    said = {**identity, "widths": [part.shape[1] for part in parts]}
    write_tensors(path, tensors, {KEY: json.dumps(said)}, align=PAGE)


def open_bundle(path: Path, identity: Mapping[str, Any], size: int) -> Bundle:
    """The layout of a bundle, checked against the model that it must belong to; no record is read.

    Args:
        path: of the file.
        identity: what it was written with.
        size: of the file, in bytes.

    Raises:
        CorruptFile: missing, truncated, another model's or block's, or its parts contradict each other.
    """
    check_whole(path, size)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        said = dict(json.loads(header["__metadata__"][KEY]))
        widths = tuple(said.pop("widths"))
        with safe_open(path, framework="pt") as tensors:
            order = tensors.get_tensor("order").numpy().copy()
            bits = tensors.get_tensor("trace").numpy()
        records = header["records"]
        dtype = {code: kind for kind, code in CODES.items()}[records["dtype"]]
        offset = 8 + length + records["data_offsets"][0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CorruptFile(f"{path} is no bundle of an offloaded model ({error}); {AGAIN}") from error
    if said != dict(identity):
        different = next(key for key in {**said, **identity} if said.get(key) != identity.get(key))
        raise CorruptFile(
            f"{path} belongs to another model: its {different} is {said.get(different)!r:.80}, not "
            f"{identity.get(different)!r:.80}; {AGAIN}"
        )
    units, whole = len(order), all(type(width) is int and width > 0 for width in widths)
    if (
        not whole
        or records["shape"] != [units, sum(widths)]
        or not np.array_equal(np.sort(order), np.arange(units))
        or bits.shape[1:] != (-(-units // 8),)
    ):
        raise CorruptFile(f"{path}: its records, their order and the trace contradict each other; {AGAIN}")
    trace = np.unpackbits(bits, axis=1, count=units, bitorder="little").astype(bool)
    return Bundle(path, widths, dtype, offset, order, trace)


def check_whole(path: Path, size: int) -> None:
    """Raise `CorruptFile` unless a file is there, as long as it was written, with a header that can be read."""
    if not path.is_file():
        raise CorruptFile(f"{path} is missing; {AGAIN}")
    found = path.stat().st_size
    if found != size:
        raise CorruptFile(f"{path} is truncated or another file: it has {found:,} bytes, not {size:,}; {AGAIN}")
    check_header(path)
