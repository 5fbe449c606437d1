"""Data that stages use while a model runs: a folder beside the weights, one safetensors file per stage.

    sparity-dynamic/00-activations.safetensors        keys SITE.NAME
    config.json: quantization_config {"quant_method": "sparity", "version": 2, "weights": "plain" | "packed",
                                      "runtime": [{"name", "options", "file", "sha256"}, ...]}

It is a folder because loaders that know nothing of it read every *.safetensors beside the weights as weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparity.checkpoints.shards import check_header, write_tensors
from sparity.errors import CorruptFile
from sparity.files import file_hash, make_folder

FOLDER = "sparity-dynamic"
AGAIN = "fetch the folder again, or load it without (sparity.load(path, runtime=False))"


@dataclass(frozen=True)
class RuntimeEntry:
    """A run-time stage of a checkpoint: its name and options in recipes, its file and the file's hash."""

    name: str
    options: Mapping[str, Any]
    file: str
    sha256: str

    @classmethod
    def read(cls, content: Any, where: str) -> "RuntimeEntry":
        """From config.json.

        Raises:
            CorruptFile: it is something else, or names a file outside the folder.
        """
        kinds = {"name": str, "options": dict, "file": str, "sha256": str}
        if not isinstance(content, dict) or {key: type(value) for key, value in content.items()} != kinds:
            raise CorruptFile(f"{where}: its list of run-time stages makes no sense; {AGAIN}")
        if Path(content["file"]).name != content["file"] or content["file"] in ("", ".", ".."):
            raise CorruptFile(f"{where}: {content['file']!r} is not a file of {FOLDER}; {AGAIN}")
        return cls(**content)


def write_runtime(
    folder: Path, place: int, name: str, options: Mapping[str, Any], data: Mapping[str, Tensor]
) -> RuntimeEntry:
    """Write the data of the stage in place `place` of a recipe beside a checkpoint's weights."""
    return rewrite_runtime(folder, RuntimeEntry(name, options, f"{place:02d}-{name}.safetensors", ""), data)


def rewrite_runtime(folder: Path, entry: RuntimeEntry, data: Mapping[str, Tensor]) -> RuntimeEntry:
    """Write the data of a stage to the file of its entry; the entry with the file's hash."""
    make_folder(folder / FOLDER)
    path = folder / FOLDER / entry.file
    write_tensors(path, data, {"format": "pt"})
    return replace(entry, sha256=file_hash(path))


def remove_other_runtime(folder: Path, keep: Iterable[RuntimeEntry]) -> None:
    """Remove the files beside a checkpoint's weights that none of its run-time stages names."""
    named = {entry.file for entry in keep}
    for path in (folder / FOLDER).glob("*.safetensors"):
        if path.name not in named:
            path.unlink()


def read_runtime(folder: Path, entry: RuntimeEntry) -> dict[str, Tensor]:
    """The data of one stage.

    Raises:
        CorruptFile: the file is missing, truncated or not the one that the configuration names.
    """
    path = folder / FOLDER / entry.file
    if not path.is_file():
        raise CorruptFile(f"{path} is missing: the model was saved with {entry.name} at run time; {AGAIN}")
    if file_hash(path) != entry.sha256:
        raise CorruptFile(f"{path} is not the file that config.json names (its hash differs); {AGAIN}")
    check_header(path)
    try:
        found: dict[str, Tensor] = load_file(path)
        return {name: tensor.clone() for name, tensor in found.items()}  # not the memory of the file, which may change
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} is truncated or damaged ({error}); {AGAIN}") from error
