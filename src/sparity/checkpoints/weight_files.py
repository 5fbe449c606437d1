"""Which files of a model folder hold its weights: those that transformers would load, and no other.

packed, as config.json says        sparity.safetensors.index.json
`transformers_weights`             the file or index that config.json names
model.safetensors                  also where an index lies beside it
model.safetensors.index.json       the shards that it names
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparity.checkpoints.packed import INDEX, METHOD, NAMED_WEIGHTS, runtime_of
from sparity.checkpoints.runtime_data import FOLDER
from sparity.checkpoints.shards import unique_json
from sparity.errors import CorruptFile, InvalidInput
from sparity.files import read_json_object

WHOLE = "model.safetensors"
PLAIN_INDEX = "model.safetensors.index.json"
OFFLOADED = "sparity-offload.json"  # says that neurons or experts lie on disk one by one
ADAPTER = "adapter_config.json"
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """The files of a folder's weights.

    Attributes:
        packed: whether they are packed.
        shards: in the order in which they are read; of a tensor in two plain shards, the later one counts.
        listed: the index, tensor -> name of its shard; None for a single file.
    """

    packed: bool
    shards: tuple[Path, ...]
    listed: Mapping[str, str] | None


def weight_files(folder: Path) -> WeightFiles:
    """The weights of a folder, by what config.json says and which files are there; no tensor is read.

    Raises:
        InvalidInput: there are none, or transformers would load something else than safetensors files of this folder.
        CorruptFile: config.json or the index makes no sense, or shards are missing.
    """
    config = _config(folder)
    _refuse_others(folder)
    packed = _says_packed(config)
    name = INDEX if packed else _plain_name(folder, config)
    listed = _index(folder / name) if name.endswith(".index.json") else None
    return WeightFiles(packed, _shard_paths(folder, name, listed), listed)


def is_read_packed(folder: Path) -> bool:
    """Whether a folder's weights are the packed ones: config.json decides."""
    return _says_packed(_config(folder))


def weight_bytes(folder: Path) -> int:
    """The size of the files that are loaded: weights, and the data of run-time stages."""
    data = [folder / FOLDER / entry.file for entry in runtime_of(folder)]
    return sum(path.stat().st_size for path in (*weight_files(folder).shards, *data) if path.is_file())


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json_object(path) if path.is_file() else {}


def _says_packed(config: Mapping[str, Any]) -> bool:
    said = config.get("quantization_config")
    return isinstance(said, dict) and said.get("quant_method") == METHOD and said.get("weights", "packed") != "plain"


def _refuse_others(folder: Path) -> None:
    """Refuse what makes transformers load more than the weights, or others."""
    if (folder / ADAPTER).exists():
        raise InvalidInput(
            f"{folder} has an {ADAPTER}: where peft is installed, transformers adds that adapter to the weights; merge "
            "it into them, or take the adapter's files out of the folder"
        )
    names = os.listdir(folder) if folder.is_dir() else []
    found = next((name for name in sorted(names) if DISTRIBUTED.match(name)), None)
    if found is not None:
        raise InvalidInput(
            f"{folder} holds a distributed checkpoint ({found}), which transformers would load in place of the others: "
            "save the model again in one process"
        )


def _plain_name(folder: Path, config: Mapping[str, Any]) -> str:
    named = config.get(NAMED_WEIGHTS)
    if named is not None:
        what = f"{folder / 'config.json'}: {NAMED_WEIGHTS} is {named!r:.100}"
        if not isinstance(named, str) or Path(named).name != named:
            raise InvalidInput(f"{what}, which is no file of this folder")
        if not named.endswith((".safetensors", ".safetensors.index.json")) or not os.path.isfile(folder / named):
            raise InvalidInput(f"{what}, which is missing or no safetensors file")
        return named
    for name in (WHOLE, PLAIN_INDEX):
        if os.path.isfile(folder / name):
            return name
    raise InvalidInput(f"{folder} has no {WHOLE} and no {PLAIN_INDEX}{_found_instead(folder)}")


def _found_instead(folder: Path) -> str:
    if (folder / INDEX).is_file():
        return f" (it holds {INDEX}, but config.json does not say that it is packed: fetch that again)"
    if (folder / OFFLOADED).is_file():
        return " (its units lie on disk one by one: open it with sparity.load_offloaded, or sparity generate --memory)"
    variants = sorted(path.name for path in folder.glob("model.*.safetensors*"))
    if variants:
        return (
            f" (it holds {', '.join(variants)}: a variant is loaded only by its name, so rename its files to those "
            "of the model)"
        )
    others = sorted(path.name for path in folder.glob("*.bin"))
    return f" (it holds {', '.join(others)}: only safetensors are read, save the model again)" if others else ""


def _index(path: Path) -> dict[str, str]:
    if not os.path.isfile(path):
        raise CorruptFile(f"{path} is missing, which says where the packed weights lie; fetch or save the model again")
    try:
        listed = dict(unique_json(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise CorruptFile(f"{path} is not a shard index ({error}); fetch or save the model again") from error
    for shard in listed.values():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".."):
            raise CorruptFile(f"{path.parent}: the shard index names {shard!r}, which is not a file of this folder")
    return listed


def _shard_paths(folder: Path, name: str, listed: Mapping[str, str] | None) -> tuple[Path, ...]:
    paths = tuple(folder / shard for shard in (sorted(set(listed.values())) if listed is not None else [name]))
    missing = [path.name for path in paths if not os.path.isfile(path)]  # False for a name that no file can have
    if missing:
        raise CorruptFile(f"{folder}: missing shards {', '.join(missing)}; fetch them again")
    return paths
