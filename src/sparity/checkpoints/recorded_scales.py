"""What stages that edit weights leave beside them: a folder, one safetensors file per stage.

    sparity-scales/01-quantize.safetensors        keys PROJECTION.NAME

It is a folder because loaders read every *.safetensors beside the weights as weights. No model needs it to be loaded.
"""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparity.checkpoints.shards import write_tensors
from sparity.errors import CorruptFile
from sparity.files import make_folder, write_atomically

SCALES = "sparity-scales"


def write_scales(folder: Path, place: int, name: str, data: Mapping[str, Tensor]) -> None:
    """Write what the stage in place `place` of a recipe left; nothing where it left nothing."""
    if data:
        make_folder(folder / SCALES)
        write_tensors(folder / SCALES / f"{place:02d}-{name}.safetensors", data, {"format": "pt"})


def carry_scales(source: Path, target: Path) -> None:
    """Copy what lies beside the weights of one checkpoint to another with the same weights."""
    for path in sorted((source / SCALES).glob("*.safetensors")):
        make_folder(target / SCALES)
        write_atomically(target / SCALES / path.name, partial(shutil.copyfile, path))


def read_scales(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Projection -> what the last stage that changed its bits left, by name; empty where none did.

    Raises:
        CorruptFile: a file that cannot be read.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for path in sorted((folder / SCALES).glob("*.safetensors")):
        own: dict[str, dict[str, Tensor]] = {}
        try:
            for key, tensor in load_file(path).items():
                projection, _, name = key.rpartition(".")
                own.setdefault(projection, {})[name] = tensor
        except (SafetensorError, OSError) as error:
            raise CorruptFile(f"{path} cannot be read ({error}): fetch it again, or remove it to round anew") from error
        found |= own
    return found
