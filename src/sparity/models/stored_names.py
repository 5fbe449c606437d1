"""Under which names a checkpoint keeps the tensors of a model."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparity.checkpoints.source import ModuleSource, Source
from sparity.errors import CorruptFile
from sparity.formats.storage.values import dtype_name
from sparity.models.families.base import Family, Fused


class StoredNames:
    """Model name -> stored name, or the names of a parameter that is stored in parts.

    Checkpoints of a bare base model lack its prefix, tied tensors may be absent, and experts that are one parameter in
    memory lie apart on disk. A model in memory has the model's own names; it is saved as checkpoints of its family are.
    """

    def __init__(
        self, skeleton: nn.Module, source: Source, family: Family, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """`state` is what the skeleton held at first, where modules of it have been replaced since."""
        self._kept: dict[str, str | Fused] = {}
        self._family = family
        self._config = skeleton.config
        self._in_memory = isinstance(source, ModuleSource)
        shapes, dtypes = source.shapes(), source.dtypes()
        tied = set(skeleton.all_tied_weights_keys)  # type: ignore[arg-type]  # empty when the configuration unties them
        missing = []
        for name, tensor in (skeleton.state_dict() if state is None else state).items():
            kept = self._find(name, f"{skeleton.base_model_prefix}.", shapes)
            if kept is not None:
                self._kept[name] = kept
                _check_shape(kept, shapes, tuple(tensor.shape))
                _check_kind(_parts(kept), dtypes, tensor)
            elif name not in tied:
                missing.append(_parts(family.stored_as(name, self._config))[0])
        if missing:
            raise CorruptFile(
                f"the checkpoint lacks {len(missing)} tensors of the model, {missing[0]} among them: "
                "it is incomplete or belongs to another configuration"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def stored(self, prefixes: tuple[str, ...] = ("",)) -> set[str]:
        """The stored names of all tensors whose model names begin with one of `prefixes`."""
        return {part for name, kept in self._kept.items() if name.startswith(prefixes) for part in _parts(kept)}

    def parts(self, names: Iterable[str]) -> list[str]:
        """The stored names of the given tensors, each once."""
        return sorted({part for name in names for part in _parts(self._kept[name])})

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor that the model calls `name`, from its stored parts."""
        kept = self._kept[name]
        return kept.join(tensors) if isinstance(kept, Fused) else tensors[kept]

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The stored parts of a tensor, as a checkpoint keeps them."""
        kept = self._family.stored_as(name, self._config) if self._in_memory else self._kept[name]
        return kept.split(tensor) if isinstance(kept, Fused) else {kept: tensor}

    def on_disk(self, name: str) -> str:
        """The name of a tensor that is stored whole, or of one that the model does not know, in a checkpoint."""
        stored = self._family.stored_as(name, self._config) if self._in_memory else name
        return stored if isinstance(stored, str) else name

    def _find(self, name: str, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> str | Fused | None:
        spellings = [name, name.removeprefix(prefix), prefix + name]
        for spelled in (name, prefix + name):  # the second where the model is one without its head
            on_disk = self._family.stored_as(spelled, self._config)
            if not isinstance(on_disk, Fused):
                spellings.append(on_disk)
            elif all(part in shapes for part in _parts(on_disk)):
                return on_disk
        return next((spelled for spelled in spellings if spelled in shapes), None)


def _parts(kept: str | Fused) -> list[str]:
    return [kept] if isinstance(kept, str) else [name for expert in kept.names for name in expert]


def _check_shape(kept: str | Fused, shapes: Mapping[str, tuple[int, ...]], wanted: tuple[int, ...]) -> None:
    for part in _parts(kept):
        expected = wanted
        if isinstance(kept, Fused):
            expected = (wanted[1] // len(kept.names[0]), *wanted[2:])
        if shapes[part] != expected:
            raise CorruptFile(f"{part} has shape {list(shapes[part])}, but the configuration asks for {list(expected)}")


def _check_kind(parts: Iterable[str], dtypes: Mapping[str, torch.dtype], wanted: Tensor) -> None:
    """Whole numbers would be cast in silence, whatever they meant."""
    for part in parts:
        if dtypes[part].is_floating_point != wanted.is_floating_point():
            found, numbers = dtype_name(dtypes[part]), "floating-point" if wanted.is_floating_point() else "whole"
            raise CorruptFile(
                f"{part} is stored as {found}, but the model has {numbers} numbers there: the file is damaged or "
                "quantised; start from the model's unquantised weights"
            )


def check_kinds(model: nn.Module, source: Source, family: Family) -> None:
    """Raise `CorruptFile` where whole numbers are stored for floating-point ones of a loaded model, or the reverse.

    Unlike `StoredNames` it bears names that only transformers can match.
    """
    dtypes, prefix = source.dtypes(), f"{model.base_model_prefix}."
    for name, tensor in model.state_dict().items():
        on_disk = _parts(family.stored_as(name, model.config))
        spellings = (name, name.removeprefix(prefix), prefix + name, *on_disk)
        _check_kind([part for part in spellings if part in dtypes], dtypes, tensor)
