"""Run-time stages of a loaded model: attached from the files that its configuration names, and saved with it again."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

from pydantic import ValidationError
from torch import Tensor

from sparity import registry
from sparity.checkpoints.packed import QUANTIZATION_KEYS, quantization_config
from sparity.checkpoints.runtime_data import (
    AGAIN,
    RuntimeEntry,
    read_runtime,
    remove_other_runtime,
    rewrite_runtime,
)
from sparity.errors import CorruptFile, InvalidInput, SparityError, UnsupportedModel
from sparity.models.block import InputSite
from sparity.models.families.base import family_of

ATTRIBUTE = "sparity_runtime"


@dataclass(frozen=True)
class AttachedRuntime:
    """What runs with a model. A copy of the model has copies of the hooks, which nothing takes off again.

    Attributes:
        entries: the stages, in their order.
        data: of each what it was fitted to.
        contexts: open for as long as the model lives.
    """

    entries: tuple[RuntimeEntry, ...]
    data: tuple[dict[str, Tensor], ...] = field(repr=False)
    contexts: ExitStack = field(repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttachedRuntime":
        return AttachedRuntime(self.entries, self.data, ExitStack())

    def __getstate__(self) -> NoReturn:
        raise InvalidInput(
            "a model with run-time stages cannot be pickled: save_pretrained writes it, and from_pretrained reads it"
        )


def attach_runtime(model: Any, folder: Path, entries: Sequence[RuntimeEntry]) -> Any:
    """Attach the run-time stages of a saved model, in place and for as long as it lives; the model is returned.

    Args:
        model: loaded by transformers, with its head or without.
        folder: where its files lie.
        entries: what its configuration names.

    Raises:
        CorruptFile: a file is missing, damaged, not the one that was saved, or does not fit the model.
        InvalidInput: a stage or an option that this release does not know.
    """
    if not entries:
        return model
    sites, data = input_sites(model), []
    with ExitStack() as opening:
        for entry in entries:
            stage, found = stage_of(entry, folder), read_runtime(folder, entry)
            try:
                opening.enter_context(stage.attach(model, sites, found))
            except CorruptFile as error:
                raise CorruptFile(f"{folder}: {error}") from error
            data.append(found)
        attached = AttachedRuntime(tuple(entries), tuple(data), opening.pop_all())
    for module in _savable(model):
        setattr(module, ATTRIBUTE, attached)
    return model


def attach_in_memory(model: Any, stage: Any, data: dict[str, Tensor]) -> Any:
    """Attach a run-time stage with its data, in place, behind those that run already; `save_pretrained` writes it too.

    Raises:
        CorruptFile: the data does not fit the model.
    """
    before = runtime_attached(model) or AttachedRuntime((), (), ExitStack())
    with ExitStack() as opening:
        opening.callback(before.contexts.close)
        opening.enter_context(stage.attach(model, input_sites(model), data))
        contexts = opening.pop_all()
    options = stage.model_dump(mode="json", exclude_unset=True)
    entry = RuntimeEntry(stage.name, options, f"{len(before.entries):02d}-{stage.name}.safetensors", "")
    attached = AttachedRuntime((*before.entries, entry), (*before.data, data), contexts)
    for module in _savable(model):
        setattr(module, ATTRIBUTE, attached)
    save_with_runtime(model)
    return model


def runtime_attached(model: Any) -> AttachedRuntime | None:
    """What runs with a model, or None."""
    found: AttachedRuntime | None = getattr(model, ATTRIBUTE, None)
    return found


def input_sites(model: Any) -> tuple[InputSite, ...]:
    """The input sites of all blocks of a loaded model, under the names of the model with its head.

    Raises:
        UnsupportedModel: its blocks do not have the shape of its family.
    """
    family, found = family_of(model.config), list[InputSite]()
    blocks = blocks_of(model)
    try:
        for index, block in enumerate(blocks):
            found += family.sites(block, f"{family.blocks}.{index}", model.config)
    except AttributeError as error:
        raise _unattachable(model, error) from error
    return tuple(found)


def blocks_of(model: Any) -> tuple[Any, ...]:
    """The blocks of a loaded model, with its head or without.

    Raises:
        UnsupportedModel: they are not where its family has them.
    """
    path, prefix = family_of(model.config).blocks, f"{model.base_model_prefix}."
    try:
        inside = model.get_submodule(path if hasattr(model, model.base_model_prefix) else path.removeprefix(prefix))
    except AttributeError as error:
        raise _unattachable(model, error) from error
    return tuple(inside.children())


def _unattachable(model: Any, error: AttributeError) -> UnsupportedModel:
    return UnsupportedModel(
        f'run-time stages cannot be attached to this model of type "{model.config.model_type}": {error}'
    )


def save_with_runtime(model: Any) -> None:
    """Let `save_pretrained` of a model with plain weights write its run-time stages too, in place."""
    for module in _savable(model):
        if runtime_attached(module) is not None:
            module.save_pretrained = MethodType(_save_pretrained, module)


def write_attached(model: Any, folder: Path) -> tuple[RuntimeEntry, ...]:
    """Write the data of what runs with a model beside its weights; the entries for config.json."""
    attached = runtime_attached(model)
    if attached is None:
        return ()
    return tuple(
        rewrite_runtime(folder, entry, data) for entry, data in zip(attached.entries, attached.data, strict=True)
    )


def without_runtime(config: Any) -> Any:
    """A configuration that names no run-time stages, in place."""
    found = getattr(config, QUANTIZATION_KEYS[0], None)
    if found is not None and found.get("weights") == "plain":
        del config.quantization_config
    elif found is not None:
        config.quantization_config = {**found, "runtime": []}
    return config


def _savable(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "save_pretrained")]


def stage_of(entry: RuntimeEntry, folder: Path) -> Any:
    """The stage of an entry; only its options come from the file.

    Raises:
        InvalidInput: this release does not know it, or one of its options.
    """
    what = f"{folder / 'config.json'}: run-time stage {entry.name!r:.80}"
    try:
        kind: Any = registry.get("stage", entry.name)
        if not hasattr(kind, "attach"):
            raise InvalidInput("it does nothing at run time")
        return kind.model_validate(entry.options)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise InvalidInput(f"{what}, option {place}: {problem['msg']}; update sparity, or {AGAIN}") from error
    except SparityError as error:
        raise InvalidInput(f"{what}: {error}; update sparity, or {AGAIN}") from error


def _save_pretrained(model: Any, save_directory: Any, is_main_process: bool = True, **arguments: Any) -> None:
    """The data is written first: a configuration that does not name it would make a dense model of this one."""
    if arguments.pop("push_to_hub", False):
        raise InvalidInput("save to a folder first, then upload the folder")
    if not is_main_process:
        return
    target, config = Path(save_directory), model.config
    entries = write_attached(model, target)
    config.quantization_config = quantization_config("plain", map(asdict, entries))
    try:
        type(model).save_pretrained(model, target, **arguments)
    finally:
        del config.quantization_config
    remove_other_runtime(target, entries)
