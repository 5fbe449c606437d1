"""The files of a model folder that are not weights: what makes it usable (tokenizer, templates) and lawful (licences).

A folder may come from anyone, and a link in it may lead anywhere. So a file is copied only when it is an ordinary one
that lies in the folder, or in the hub's cache, whose snapshots link to its blobs; whatever else has such a name is
refused.
"""

import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from sparity.checkpoints.recorded_scales import SCALES
from sparity.checkpoints.runtime_data import FOLDER
from sparity.errors import InvalidInput
from sparity.files import make_folder, write_atomically

TEMPLATES = "additional_chat_templates"
USABLE = (
    "tokenizer*", "vocab*", "merges*.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    f"{TEMPLATES}/*.jinja", "generation_config.json", "*.tiktoken", "*.model", "*.spm", "bpe.codes",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
LAWFUL = (
    "*licen[cs]e*", "licenses/*", "notice*", "copying*", "copyright*", "*use_policy*", "*use-policy*", "terms*",
    "patents*", "attribution*", "third*party*", "legal/*",
)  # fmt: skip
ROOMS = (TEMPLATES, "licenses", "legal")  # folders whose files are companions, in lower case
WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack",
    ".ckpt", ".onnx",
)  # fmt: skip
OWN = ("config.json",)  # copied with changes


def companions(folder: Path) -> tuple[str, ...]:
    """The names, within a dense model's folder, of the files that a sparse model made from it needs too.

    Raises:
        InvalidInput: one is no ordinary file of the folder, see `checked`.
    """
    names = [name for name in _files(folder) if any(fnmatch(name.lower(), pattern) for pattern in (*USABLE, *LAWFUL))]
    checked(folder, [*OWN, *_runtime(folder)])
    return checked(folder, names)


def everything(folder: Path) -> tuple[str, ...]:
    """The names of all files that lie in a folder beside its weights: what another layout of the same model has too.

    Raises:
        InvalidInput: one is no ordinary file of the folder, see `checked`.
    """
    checked(folder, _runtime(folder))
    return checked(folder, _files(folder))


def checked(folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    """The names again, each that of an ordinary file in the folder or of a blob in the hub's cache.

    Raises:
        InvalidInput: one is a device, a pipe, a link that leads elsewhere or nowhere, or has a name beyond printing.
    """
    found = tuple(names)
    for name in found:
        path = folder / name
        if not name.isprintable():
            raise InvalidInput(f"{str(path)!a} has a name that no model card can show: give the file another one")
        if os.path.lexists(path) and not _is_own(folder, path):
            leads = f", a link to {os.readlink(path)}" if path.is_symlink() else ""
            raise InvalidInput(
                f"{path} is no ordinary file of the model's folder{leads}: what lies elsewhere is not copied into a "
                "model; put the file itself there, or take the name away"
            )
    return found


def copy_files(folder: Path, names: Iterable[str], target: Path) -> None:
    """Copy files of a folder to the same names in another one, each complete or not at all."""
    for name in checked(folder, names):
        make_folder((target / name).parent)
        write_atomically(target / name, partial(shutil.copyfile, os.path.realpath(folder / name)))


def _files(folder: Path) -> list[str]:
    """Everything but folders that lies in a folder or in one of its rooms, and is not named as weights are."""
    places = [folder, *(place for place in sorted(folder.iterdir()) if place.name.lower() in ROOMS and place.is_dir())]
    entries = [entry for place in places for entry in sorted(place.iterdir()) if not entry.is_dir()]
    return [str(entry.relative_to(folder)) for entry in entries if not entry.name.lower().endswith(WEIGHTS)]


def _runtime(folder: Path) -> list[str]:
    places = (folder / FOLDER, folder / SCALES)
    return [str(path.relative_to(folder)) for place in places for path in sorted(place.glob("*.safetensors"))]


def _is_own(folder: Path, path: Path) -> bool:
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))  # unlike resolve, at ease with loops
    blobs = home.parent.parent / "blobs"
    inside = real.is_relative_to(home) or (home.parent.name == "snapshots" and real.parent == blobs)
    return inside and os.path.isfile(real)
