"""What stages found beside the weights, block by block in the run's state, then as one file per stage."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparity.checkpoints.runtime_data import FOLDER, write_runtime
from sparity.checkpoints.shards import write_tensors
from sparity.errors import CorruptFile
from sparity.files import make_folder, write_atomically
from sparity.pipeline.run.pass_folder import START_OVER
from sparity.pipeline.run.planned import PlannedStage


def save_fitted(state: Path, place: int, block: int, tensors: Mapping[str, Tensor]) -> None:
    """Keep what the stage in `place` of the recipe found in a block."""
    write_tensors(_file(state, place, block), tensors)


def save_carried(state: Path, place: int, block: int, tensors: Mapping[str, Tensor]) -> None:
    """Keep what the fit of a block leaves for the next one; what an earlier one left is not needed any more."""
    if tensors:
        write_tensors(_carried(state, place, block), tensors)
    _carried(state, place, block - 2).unlink(missing_ok=True)


def read_carried(state: Path, place: int, block: int) -> Mapping[str, Tensor]:
    """What the fit of the block before left; nothing where it left nothing.

    Raises:
        CorruptFile: it is damaged.
    """
    path = _carried(state, place, block - 1)
    try:
        found: Mapping[str, Tensor] = load_file(path) if path.exists() else {}
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} is damaged ({error}): {START_OVER}") from error
    return found


def read_fitted(state: Path, place: int, blocks: int) -> dict[str, Tensor]:
    """What the stage in `place` of the recipe found in all blocks.

    Raises:
        CorruptFile: what was kept of a block is missing or damaged.
    """
    data: dict[str, Tensor] = {}
    for block in range(blocks):
        path = _file(state, place, block)
        try:
            data.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CorruptFile(f"{path} is missing or damaged ({error}): {START_OVER}") from error
    return data


def save_refined(state: Path, place: int, data: Mapping[str, Tensor]) -> None:
    """Keep what the stage made of its data with the whole model."""
    write_tensors(_refined(state, place), data)


def read_refined(state: Path, place: int) -> dict[str, Tensor] | None:
    """What `save_refined` kept, or None.

    Raises:
        CorruptFile: it is damaged.
    """
    path = _refined(state, place)
    try:
        return load_file(path) if path.exists() else None
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} is damaged ({error}): {START_OVER}") from error


def publish_fitted(each: PlannedStage, data: Mapping[str, Tensor], target: Path) -> dict[str, Any]:
    """Write the data of all blocks as one file beside the weights in `target`; the entry for config.json."""
    options = each.stage.model_dump(mode="json")
    return asdict(write_runtime(target, each.place, each.stage.name, options, data))


def carry_runtime(source: Path, target: Path) -> None:
    """Copy the data that an earlier pass left beside its weights."""
    for path in sorted((source / FOLDER).glob("*.safetensors")):
        make_folder(target / FOLDER)
        write_atomically(target / FOLDER / path.name, partial(shutil.copyfile, path))


def _carried(state: Path, place: int, block: int) -> Path:
    return state / f"carried-{place}-{block}.safetensors"


def _refined(state: Path, place: int) -> Path:
    return state / f"refined-{place}.safetensors"


def _file(state: Path, place: int, block: int) -> Path:
    return state / f"fitted-{place}-{block}.safetensors"
