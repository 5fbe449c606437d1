"""`save_pretrained` of a model with packed layers: the packed layout, which a loader without Sparity refuses."""

import shutil
import tempfile
from pathlib import Path
from types import MethodType
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from sparity.checkpoints import packed
from sparity.checkpoints.runtime_data import remove_other_runtime
from sparity.engine.modules.experts import PackedExperts
from sparity.engine.modules.linear import PackedLinear
from sparity.engine.modules.packed_matrix import HoldsMatrix
from sparity.errors import InvalidInput
from sparity.files import make_folder
from sparity.formats import Packed
from sparity.models.attached_runtime import save_with_runtime, write_attached


def save_packed(model: Any) -> None:
    """Let `save_pretrained` of a model, and of the one without its head, write the packed layout, in place."""
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            module.save_pretrained = MethodType(_save_pretrained, module)


def save_plain(model: Any) -> None:
    """Undo `save_packed`; run-time stages are saved as before."""
    for module in model.modules():
        vars(module).pop("save_pretrained", None)
    save_with_runtime(model)


def unpacked_state(model: Any) -> dict[str, Tensor]:
    """The state dict without the weights that are packed."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        nn.Module._save_to_state_dict(module, found, f"{name}." if name else "", False)
    return found


def _save_pretrained(model: Any, save_directory: Any, is_main_process: bool = True, **arguments: Any) -> None:
    """All but the packed weights is written by transformers to a folder beside; then everything is moved in.

    The configuration is moved last: with it the folder is complete.
    """
    if arguments.pop("push_to_hub", False):
        raise InvalidInput("save to a folder first, then upload the folder")
    if arguments.get("variant"):
        raise InvalidInput("a packed checkpoint has no variants: leave variant out")
    if arguments.pop("state_dict", None) is not None:
        raise InvalidInput("packed weights are saved as they are in the model: leave state_dict out")
    if not is_main_process:
        return
    target = Path(save_directory)
    make_folder(target)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as room:
        written = Path(room)
        type(model).save_pretrained(
            model, written, **{**arguments, "state_dict": unpacked_state(model), "max_shard_size": "1000GB"}
        )
        entries = write_attached(model, target)
        packed.mark(written, is_packed=True, entries=entries)
        linear = {module.matrix: module for module in model.modules() if isinstance(module, PackedLinear)}
        found = {module.matrix: module.packed for module in model.modules() if isinstance(module, HoldsMatrix)}
        sparse, dense = _experts(model)
        shard = target / packed.packed_shard(1, 1)
        packed.write_shard(
            shard,
            found | sparse,
            load_file(written / "model.safetensors") | dense,
            [name for name, module in linear.items() if module.transposed],
        )
        packed.write_packed_index(target, [shard])
        packed.remove_other_weights(target, [shard])
        for path in sorted(written.iterdir(), key=lambda path: path.name == "config.json"):
            if not path.name.startswith("model.safetensors"):
                shutil.move(path, target / path.name)
    remove_other_runtime(target, entries)


def _experts(model: Any) -> tuple[dict[str, Packed], dict[str, Tensor]]:
    """The experts' matrices: those to store packed, and the ordinary tensors of those that are dense as they are."""
    sparse, dense = {}, {}
    for module in model.modules():
        for name, matrix in module.matrices() if isinstance(module, PackedExperts) else ():
            if matrix.plain:
                dense[f"{name}.weight"] = matrix.tensors["values"]
            else:
                sparse[name] = matrix
    return sparse, dense
