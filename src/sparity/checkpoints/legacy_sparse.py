"""Checkpoints in the sparse layouts that compressed-tensors dropped: what config.json says, and where the parts lie.

    NAME.shape, NAME.compressed, NAME.bitmask (, NAME.row_offsets)    stand for the tensor NAME.weight

Releases before 0.9 call the parts by the tensor, NAME.weight.compressed and so on, and store every tensor in this way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparity.checkpoints.packed import METHOD, QUANTIZATION_KEYS, check_version
from sparity.errors import CorruptFile, UnsupportedModel
from sparity.files import read_json_object
from sparity.formats.conversions.compressed_tensors import PARTS, Header, check_headers, restore
from sparity.formats.storage.values import aligned

ABOUT = {"sparsity_config", "quant_method", "version", "registry_requires_subclass"}
EMPTY = {"format": "dense", "quantization_status": "initialized"}  # what stands there when nothing is quantised
SUFFIXES = tuple(sorted({part for parts in PARTS.values() for part in parts}))
DENSE = "dense"


@dataclass(frozen=True)
class Rescued:
    """One weight in an orphaned layout: where its parts lie, and what they make.

    Attributes:
        stored: the name of the tensor that it stands for.
        homes: the name of each part -> its file; the names end in a part of `PARTS[layout]`.
        shape: of the tensor that it stands for.
        dtype: of the tensor that it stands for.
    """

    layout: str
    stored: str
    homes: Mapping[str, Path]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return tuple(self.homes)

    def weight(self) -> Tensor:
        """The dense tensor, of `shape`.

        Raises:
            CorruptFile: the parts contradict each other.
        """
        parts = {name.rpartition(".")[2]: _read(path, name) for name, path in self.homes.items()}
        try:
            return restore(self.layout, self.shape, parts)
        except CorruptFile as error:
            raise CorruptFile(f"{self.homes[self.parts[0]].parent}, {self.stored}: {error}") from error


def layout_of(folder: Path) -> str | None:
    """What the config.json of a folder says its weights were compressed with; None when they are plain or packed.

    Returns:
        One of `PARTS`, or `dense` when compressed-tensors only says that they are sparse.

    Raises:
        InvalidInput: they are packed in a version that this release does not read.
        UnsupportedModel: the weights are quantised, or in a layout that is not one of these.
        CorruptFile: config.json is not JSON.
    """
    path = folder / "config.json"
    config = read_json_object(path) if path.is_file() else {}
    found = next((config[key] for key in QUANTIZATION_KEYS if config.get(key)), None)
    if found is None:
        return None
    if isinstance(found, dict) and found.get("quant_method") == METHOD:
        check_version(found)
        return None
    sparsity = found.get("sparsity_config") if isinstance(found, dict) else None
    if not isinstance(sparsity, dict) or not sparsity:
        raise UnsupportedModel(f"{folder} is already quantised: start from the model's unquantised weights")
    layout = sparsity.get("format")
    more = sorted(key for key, value in found.items() if key not in ABOUT and value and EMPTY.get(key) != value)
    if more:
        raise UnsupportedModel(
            f"{folder} is sparse ({layout}) and already quantised ({', '.join(more)}), and only sparse layouts of "
            "unquantised weights can be read: start from the model's unquantised weights"
        )
    if layout not in (DENSE, *PARTS):
        raise UnsupportedModel(
            f"{folder}: the sparse layout {layout!r} is not supported, only {', '.join(PARTS)}: start from the model's "
            "plain weights"
        )
    return str(layout)


def find(layout: str, homes: Mapping[str, Path], headers: Mapping[str, Header]) -> dict[str, Rescued]:
    """The weights in an orphaned `layout` among a checkpoint's tensors, whose homes, shapes and types are given; by the
    names that they stand for.

    Only the small `shape` tensors are read.

    Raises:
        CorruptFile: parts are missing, or do not go with each other.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in homes:
        prefix, _, part = name.rpartition(".")
        if part in SUFFIXES and prefix:
            groups.setdefault(prefix, {})[part] = name
    found: dict[str, Rescued] = {}
    for prefix, parts in groups.items():
        weight = _rescued(layout, prefix, parts, homes, headers)
        if weight.stored in found:
            raise CorruptFile(f"{homes[weight.parts[0]]}: {weight.stored} is there twice")
        found[weight.stored] = weight
    return found


def _rescued(
    layout: str, prefix: str, parts: Mapping[str, str], homes: Mapping[str, Path], headers: Mapping[str, Header]
) -> Rescued:
    where = f"{homes[next(iter(parts.values()))]}, {prefix}"
    if set(parts) != set(PARTS[layout]):
        raise CorruptFile(f"{where}: {layout} needs {', '.join(PARTS[layout])}, found {', '.join(sorted(parts))}")
    sides, dtype = headers[parts["shape"]]
    if dtype != torch.int64 or sides not in ((1,), (2,), (2, 1)):
        raise CorruptFile(f"{where}: its shape is stored as {list(sides)} in {dtype}, not as one or two whole numbers")
    shape = tuple(_read(homes[parts["shape"]], parts["shape"]).reshape(-1).tolist())
    try:
        check_headers(layout, shape, {part: headers[name] for part, name in parts.items()})
    except CorruptFile as error:
        raise CorruptFile(f"{where}: {error}") from error
    whole = prefix.rpartition(".")[2] in ("weight", "bias")
    stored = prefix if whole else f"{prefix}.weight"
    own = {name: homes[name] for name in parts.values()}
    return Rescued(layout, stored, own, shape, headers[parts["compressed"]][1])


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return aligned(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} changed or vanished while it was read ({error})") from error
