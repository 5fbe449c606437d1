"""What stages that edit weights leave beside them: a folder, one safetensors file per stage.

    sparity-scales/01-quantize.safetensors        keys PROJECTION.NAME

It is a folder because loaders read every *.safetensors beside the weights as weights. No model needs it to be loaded.
"""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from sparity.checkpoints.shards import write_tensors
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
