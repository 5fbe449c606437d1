"""What lies in the folder of an offloaded model, checked; and the part of it that is always in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparity.checkpoints.weight_files import OFFLOADED
from sparity.dynamic.offload.bundle import AGAIN, KEY, Bundle, check_whole, open_bundle
from sparity.dynamic.offload.deciding import KINDS
from sparity.errors import CorruptFile, InvalidInput
from sparity.files import read_json_object
from sparity.models import transformers as hf
from sparity.models.attached_runtime import without_runtime

FORMAT = 1


def read_manifest(folder: Path) -> dict[str, Any]:
    """What says which files belong together.

    Raises:
        InvalidInput: the folder holds no offloaded model.
        CorruptFile: it makes no sense, or names files elsewhere.
    """
    path = folder / OFFLOADED
    if not path.is_file():
        raise InvalidInput(
            f"{folder} holds no {OFFLOADED}: write an offloaded model with sparity offload MODEL -o FOLDER"
        )
    content = read_json_object(path, f"; {AGAIN}")
    if content.get("format") != FORMAT:
        raise CorruptFile(
            f"{path}: this release reads format {FORMAT}, not {content.get('format')!r:.40}; update sparity"
        )
    try:
        kinds = {"model": str, "file": str, "bytes": int, "number": int, "block": int, "units": int}
        files = [*content["resident"], *content["bundles"]]
        fits = content["kind"] in KINDS and content["resident"] and content["bundles"]
        fits = fits and all(type(each[key]) is kinds[key] for each in files for key in each)
        fits = fits and all(Path(each["file"]).name == each["file"] for each in files)
        hf.named_dtype(content["dtype"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{path} makes no sense ({type(error).__name__}: {error}); {AGAIN}") from error
    if not fits:
        raise CorruptFile(f"{path} makes no sense; {AGAIN}")
    return content


def open_bundles(folder: Path, manifest: Mapping[str, Any]) -> list[Bundle]:
    """The bundles, each checked, all with records of one shape.

    Raises:
        CorruptFile: one is missing, truncated, another model's, or unlike the others.
    """
    found = [
        open_bundle(folder / each["file"], {key: each[key] for key in ("model", "block", "number")}, each["bytes"])
        for each in manifest["bundles"]
    ]
    if other := next((b for b in found if (b.widths, b.dtype) != (found[0].widths, found[0].dtype)), None):
        raise CorruptFile(f"{other.path}: its records have another shape than those of {found[0].path.name}; {AGAIN}")
    return found


def resident_model(folder: Path, manifest: Mapping[str, Any]) -> Any:
    """The transformers model with all that is always in memory; parameters of units have no memory yet.

    Raises:
        CorruptFile: a file is missing, truncated, another model's, or does not fit the configuration.
    """
    config = without_runtime(hf.read_config(folder))
    model: Any = hf.empty_model(config, hf.named_dtype(manifest["dtype"]))
    for each in manifest["resident"]:
        path = folder / each["file"]
        check_whole(path, each["bytes"])
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CorruptFile(f"{path} is damaged ({error}); {AGAIN}") from error
        if said != {"model": manifest["model"], "number": each["number"]}:
            raise CorruptFile(f"{path} belongs to another model; {AGAIN}")
        wrong = [name for name, tensor in tensors.items() if _shape(model, name) != tensor.shape]
        if wrong:
            raise CorruptFile(f"{path}: {wrong[0]} does not fit config.json; {AGAIN}")
        model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.requires_grad_(False)
    model.config.return_dict = True
    return model.eval()


def _shape(model: Any, name: str) -> torch.Size | None:
    try:
        return torch.Size(model.get_parameter(name).shape)
    except AttributeError:
        pass
    try:
        return torch.Size(model.get_buffer(name).shape)
    except AttributeError:
        return None
