"""Under which names a checkpoint keeps the tensors of a model."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from sparity.checkpoints.source import ModuleSource, Source
from sparity.errors import CorruptFile
from sparity.models.families.base import Family, Fused


class StoredNames:
    """Model name -> stored name, or the names of a parameter that is stored in parts.

    Checkpoints of a bare base model lack its prefix, tied tensors may be absent, and experts that are one parameter in
    memory lie apart on disk. A model in memory has the model's own names; it is saved as checkpoints of its family are.
    """

    def __init__(self, skeleton: nn.Module, source: Source, family: Family) -> None:
        self._kept: dict[str, str | Fused] = {}
        self._family = family
        self._config = skeleton.config
        self._in_memory = isinstance(source, ModuleSource)
        shapes = source.shapes()
        tied = set(skeleton.all_tied_weights_keys)  # type: ignore[arg-type]  # empty when the configuration unties them
        missing = []
        for name, tensor in skeleton.state_dict().items():
            kept = self._find(name, f"{skeleton.base_model_prefix}.", shapes)
            if kept is not None:
                self._kept[name] = kept
                _check_shape(kept, shapes, tuple(tensor.shape))
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
        on_disk = self._family.stored_as(name, self._config)
        if isinstance(on_disk, Fused):
            if all(part in shapes for part in _parts(on_disk)):
                return on_disk
            return name if name in shapes else None
        return next((choice for choice in (name, name.removeprefix(prefix), on_disk) if choice in shapes), None)


def _parts(kept: str | Fused) -> list[str]:
    return [kept] if isinstance(kept, str) else [name for expert in kept.names for name in expert]


def _check_shape(kept: str | Fused, shapes: Mapping[str, tuple[int, ...]], wanted: tuple[int, ...]) -> None:
    for part in _parts(kept):
        expected = wanted
        if isinstance(kept, Fused):
            expected = (wanted[1] // len(kept.names[0]), *wanted[2:])
        if shapes[part] != expected:
            raise CorruptFile(f"{part} has shape {list(shapes[part])}, but the configuration asks for {list(expected)}")
