"""Packed checkpoints: where their tensors lie, and the dense weights that their matrices stand for.

    sparity.safetensors.index.json         every tensor's shard
    sparity-00001-of-0000N.safetensors     1: what lies outside the blocks; then one shard per block

A packed matrix NAME stands for the tensor NAME.weight; its parts are the tensors NAME.masks, NAME.values and so on.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparity.checkpoints import packed_file
from sparity.checkpoints.runtime_data import AGAIN, RuntimeEntry
from sparity.checkpoints.shards import shard_name, write_index
from sparity.errors import CorruptFile, InvalidInput
from sparity.files import read_json_object, write_json
from sparity.formats import Packed, unpack
from sparity.formats.storage.values import DTYPE_NAMES

INDEX = "sparity.safetensors.index.json"
TRANSPOSED = "transposed"  # metadata: names of matrices whose tensor is stored as [in, out], as GPT-2's are
UNUSED = "unused"  # metadata: names of tensors that the model has no use for, carried along as they are
METHOD = "sparity"
NAMED_WEIGHTS = "transformers_weights"  # of config.json: the file or index that transformers loads in place of its own
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # of config.json; the second in old ones
VERSION = 2  # of what config.json says
READABLE = (1, VERSION)  # version 1 has packed weights and nothing at run time
WEIGHTS = ("plain", "packed")


def packed_shard(number: int, total: int) -> str:
    """The file of packed shard `number` of `total`, counted from 1."""
    return shard_name(METHOD, number, total)


@dataclass(frozen=True)
class StoredMatrix:
    """A packed matrix in a shard: its header entry, not its content."""

    path: Path
    name: str
    entry: Mapping[str, Any]
    transposed: bool

    @property
    def stored(self) -> str:
        """The name of the tensor that it stands for."""
        return f"{self.name}.weight"

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return tuple(f"{self.name}.{part}" for part in self.entry["hashes"])

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor that it stands for: `[out, in]`, or `[in, out]` when it is transposed."""
        rows, columns = self.entry["shape"]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that it stands for."""
        return DTYPE_NAMES[self.entry["dtype"]]

    def packed(self) -> Packed:
        """The matrix `[out, in]`, its hashes and its content checked.

        Raises:
            CorruptFile: altered, or contents that contradict each other.
        """
        return packed_file.read_matrix(self.path, self.name, self.entry)

    def weight(self) -> Tensor:
        """The dense tensor, of `shape`."""
        matrix = unpack(self.packed())
        return matrix.T.contiguous() if self.transposed else matrix


def matrices(path: Path) -> dict[str, StoredMatrix]:
    """The packed matrices of a shard by name.

    Raises:
        CorruptFile: truncated, of a later version, or without a readable header.
    """
    entries = packed_file.read_entries(path)
    transposed = _listed(path, TRANSPOSED)
    if not transposed <= entries.keys():
        raise CorruptFile(f"{path}: its header calls matrices transposed that are not there; fetch the file again")
    turned = set(transposed)
    return {name: StoredMatrix(path, name, entry, name in turned) for name, entry in entries.items()}


def unused(path: Path) -> set[str]:
    """The tensors of a shard that the model has no use for, as its header names them.

    Raises:
        CorruptFile: the header makes no sense.
    """
    return _listed(path, UNUSED)


def _listed(path: Path, key: str) -> set[str]:
    """The names in a list of a shard's metadata."""
    with safe_open(path, framework="pt") as shard:
        said = (shard.metadata() or {}).get(key, "[]")
    try:
        found = json.loads(said)
    except (TypeError, ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: its header makes no sense ({error!r:.200}); fetch the file again") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CorruptFile(f"{path}: its header has no list of names under {key!r}; fetch the file again")
    return set(found)


def quantization_config(weights: str, runtime: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What config.json says of a checkpoint that Sparity reads: how its weights lie, and its run-time stages."""
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "weights": weights,
        "runtime": [dict(entry) for entry in runtime],
    }


def check_version(quantization: Mapping[str, Any]) -> None:
    """Raise `InvalidInput` when config.json tells of a version, or of weights, that this release does not read."""
    weights = quantization.get("weights", "packed")
    if weights not in WEIGHTS:
        raise InvalidInput(f"a checkpoint of Sparity with {weights!r:.40} weights: plain or packed; update sparity")
    version = quantization.get("version", VERSION)
    if type(version) is not int or version not in READABLE:
        raise InvalidInput(
            f"a checkpoint of Sparity in version {version!r:.40}; this release reads {VERSION}: update sparity"
        )


def runtime_of(folder: Path) -> tuple[RuntimeEntry, ...]:
    """The run-time stages that a folder's config.json names, in their order.

    Raises:
        CorruptFile: the list makes no sense.
    """
    path = folder / "config.json"
    quantization = read_json_object(path).get("quantization_config") if path.is_file() else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        return ()
    return runtime_entries(quantization, str(path))


def runtime_entries(quantization: Mapping[str, Any], where: str) -> tuple[RuntimeEntry, ...]:
    """The run-time stages of a `quantization_config`; `where` names it in messages."""
    found = quantization.get("runtime", [])
    if not isinstance(found, list | tuple):
        raise CorruptFile(f"{where}: its list of run-time stages makes no sense; {AGAIN}")
    return tuple(RuntimeEntry.read(entry, where) for entry in found)


def write_shard(
    path: Path,
    found: Mapping[str, Packed],
    others: Mapping[str, Tensor],
    transposed: Collection[str],
    unused: Collection[str] = (),
    huffman: bool = False,
) -> None:
    """Write one shard: packed matrices by name, and other tensors by theirs; `huffman` as of `packed_file.write`."""
    metadata = {"format": "pt", TRANSPOSED: json.dumps(sorted(set(transposed) & set(found)))}
    if extra := sorted(set(unused) & set(others)):
        metadata[UNUSED] = json.dumps(extra)
    packed_file.write(path, found, others, metadata, huffman)


def write_packed_index(folder: Path, files: Collection[Path]) -> None:
    """Write the index over all shards; with it the checkpoint is complete."""
    homes, total = {}, 0
    for shard in sorted(files):
        with safe_open(shard, framework="pt") as opened:
            homes.update(dict.fromkeys(opened.keys(), shard.name))
        total += shard.stat().st_size
    write_index(folder / INDEX, homes, total)


def mark(folder: Path, is_packed: bool, entries: Iterable[RuntimeEntry] | None = None) -> None:
    """Say in config.json who reads the weights, transformers with Sparity or by itself, and name run-time stages.

    Without `entries` those that it names already stay.
    """
    runtime = [asdict(entry) for entry in (runtime_of(folder) if entries is None else entries)]
    config = read_json_object(folder / "config.json")
    for key in (*QUANTIZATION_KEYS, NAMED_WEIGHTS):
        config.pop(key, None)
    if is_packed or runtime:
        config["quantization_config"] = quantization_config("packed" if is_packed else "plain", runtime)
    write_json(folder / "config.json", config)


def remove_other_weights(folder: Path, keep: Collection[Path]) -> None:
    """Remove every weight file and plain index of a folder but those to keep."""
    for pattern in ("model*.safetensors", "model.safetensors.index.json", "sparity-*.safetensors"):
        for path in folder.glob(pattern):
            if path not in keep:
                path.unlink()
