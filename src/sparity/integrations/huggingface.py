"""Sparity's checkpoints in transformers: `AutoModelForCausalLM.from_pretrained` reads, `save_pretrained` writes.

They have packed weights, run-time stages beside the weights, or both.

Imported by the hook in `sparity/__init__.py` once transformers' quantizers are there.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparity.checkpoints import packed
from sparity.checkpoints.packed import INDEX, METHOD, VERSION, StoredMatrix
from sparity.checkpoints.source import CheckpointSource
from sparity.engine.decoding.model import enable_fast_path
from sparity.engine.kernels import native
from sparity.engine.modules.by_channel import laid_out
from sparity.engine.modules.experts import PackedExpert, PackedExperts
from sparity.engine.modules.linear import PackedLinear
from sparity.engine.saving import save_packed, unpacked_state
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats import Packed, build_format
from sparity.integrations.stored_vocabulary import place_vocabulary
from sparity.models.attached_runtime import attach_runtime, save_with_runtime
from sparity.models.experts import ExpertNames, expert_matrices, experts_of
from sparity.models.families.base import family_of
from sparity.models.packed_layers import check_nothing_else
from sparity.models.stored_names import StoredNames
from sparity.models.vocabulary import forget_ties
from sparity.visible import logger

log = logger(__name__)

MOST_PARTS = 64  # kinds of tensors of packed matrices; all formats and encodings together have fewer


@register_quantization_config(METHOD)
class SparityConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint that Sparity reads: how its weights lie, and its run-time stages."""

    def __init__(self, version: int = VERSION, weights: str = "packed", runtime: Any = (), **_: Any) -> None:
        self.quant_method = METHOD
        self.version = version
        self.weights = weights
        self.runtime = runtime

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps."""
        return packed.quantization_config(self.weights, self.runtime)


@register_quantizer(METHOD)
class SparityQuantizer(HfQuantizer):
    """Puts packed layers where a matrix is packed, with their shards, and attaches what was saved for run time."""

    requires_calibration = True

    def validate_environment(self, *_: Any, **arguments: Any) -> None:
        """Refuse what packed weights cannot do, and what this release does not know, before anything is read."""
        said = self.quantization_config
        packed.check_version({"version": said.version, "weights": said.weights})
        self._entries = packed.runtime_entries({"runtime": said.runtime}, "config.json")
        device_map = arguments.get("device_map")
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if self._packed and not {str(place) for place in places} <= {"None", "auto", "cpu"}:
            raise InvalidInput("packed weights are multiplied on the CPU: leave device_map out, or convert to plain")

    @property
    def _packed(self) -> bool:
        return bool(self.quantization_config.weights == "packed")

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the shards; only here is the model's configuration at hand before its files are looked for."""
        if self._packed:
            config.transformers_weights = INDEX
        return config

    update_tp_plan = update_attn_implementation  # the same moment in releases before 5.20

    def update_ep_plan(self, config: Any) -> Any:
        """Nothing; releases before 5.20 ask."""
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Packed weights have the type that they were packed in."""
        return dtype

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        shards = sorted(set(map(Path, checkpoint_files or ())))
        if not shards:
            raise InvalidInput("a checkpoint of Sparity is loaded from its folder, not from a state_dict")
        self._folder = _folder_of(shards, model.name_or_path)
        if not self._packed:
            return model
        _check_complete(shards)
        self._source, state = CheckpointSource(self._folder), model.state_dict()
        self._experts = _replace_experts(model, self._source)
        apart = {name for module in self._experts.values() for expert in module.names for name in expert}
        found = self._source.matrices.values()
        self._vocabulary = place_vocabulary(model, self._source, _spellings(model))
        apart |= self._vocabulary.names
        self._waiting = [_replace(model, matrix.name, matrix) for matrix in found if matrix.name not in apart]
        named = {part for matrix in found for part in matrix.entry["hashes"]}
        if len(named) > MOST_PARTS:  # every name of the files is held against every one of these
            raise CorruptFile(f"{self._folder}: its matrices have {len(named):,} kinds of tensors; fetch it again")
        _check_contents(model, self._source, state)
        if self._vocabulary.embedding is not None:
            forget_ties(model)
        parts = "|".join(sorted(named))
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        ignored |= {rf"\.({parts})$", *(rf"(^|\.){re.escape(path)}\." for path in self._experts)}
        model._keys_to_ignore_on_load_unexpected = ignored  # they are read behind the others
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        attach_runtime(model, self._folder, self._entries)
        if not self._packed:
            self.remove_quantization_config(model)  # it is an ordinary model with hooks
            vars(model.config).pop("_is_quantized", None)
            save_with_runtime(model)
            return model
        names = {module: name for name, module in model.named_modules()}
        for module, matrix in self._waiting:
            module.give(laid_out(model, names[module], module, matrix.packed()))
        _say_what_is_slow(module.prepared.declined for module, _ in self._waiting)
        self._vocabulary.give()
        for experts in self._experts.values():
            experts.give(_read_experts(self._source, experts.names))
        del self._waiting, self._experts, self._vocabulary, self._source
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        save_packed(model)
        return enable_fast_path(model)

    def get_state_dict_and_metadata(self, model: Any, *_: Any, **__: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What transformers writes when a model is saved; `engine.saving` writes the rest."""
        return unpacked_state(model), {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """See `engine.saving`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return not self._packed


def _replace(model: nn.Module, name: str, matrix: StoredMatrix) -> tuple[PackedLinear, StoredMatrix]:
    """Put a `PackedLinear` in the place of a matrix's module; checkpoints may leave out the model's prefix."""
    for path in (spell(name) for spell in _spellings(model)):
        owner_path, _, leaf = path.rpartition(".")
        try:
            owner = model.get_submodule(owner_path)
            original = owner.get_submodule(leaf)
        except AttributeError:
            continue
        rows, columns = matrix.entry["shape"]
        if not isinstance(original, Conv1D if matrix.transposed else nn.Linear):
            kind = type(original).__name__
            raise CorruptFile(f"{matrix.path}: {name} is packed as a linear layer, but is a {kind} in this model")
        if tuple(original.get_parameter("weight").shape) != matrix.shape:
            raise CorruptFile(f"{matrix.path}: {name} is packed as {rows} x {columns}, which does not fit the model")
        module = PackedLinear(name, columns, rows, getattr(original, "bias", None), matrix.transposed)
        setattr(owner, leaf, module)
        return module, matrix
    raise CorruptFile(f"{matrix.path}: the model has no module {name}: the configuration belongs to another model")


def _replace_experts(model: nn.Module, source: CheckpointSource) -> dict[str, PackedExperts]:
    """Put `PackedExperts` where any matrix of an expert is packed -> each by its path in the model."""
    placed: dict[str, PackedExperts] = {}
    for path, own in experts_of(model).items():
        spelled = (tuple((s(gate), s(up), s(down)) for gate, up, down in own) for s in _spellings(model))
        names = next((found for found in spelled if _any_packed(found, source)), None)
        if names is None:
            continue
        original = model.get_submodule(path)
        _check_experts(source, names, [tuple(matrix.shape) for matrix in expert_matrices(original, 0)])
        owner, _, leaf = path.rpartition(".")
        placed[path] = PackedExperts.like(original, names)
        setattr(model.get_submodule(owner), leaf, placed[path])
    return placed


def _any_packed(names: ExpertNames, source: CheckpointSource) -> bool:
    return any(f"{name}.weight" in source.matrices for expert in names for name in expert)


def _check_experts(source: CheckpointSource, names: ExpertNames, shapes: list[tuple[int, ...]]) -> None:
    """Every gate, up and down is there, in the model's `shapes` of the three."""
    stored = source.shapes()
    for name, wanted in ((name, wanted) for expert in names for name, wanted in zip(expert, shapes, strict=True)):
        found, matrix = stored.get(f"{name}.weight"), source.matrices.get(f"{name}.weight")
        if found is None:
            raise CorruptFile(f"{source.folder}: {name} is missing, while other experts beside it are packed")
        if found != wanted or (matrix is not None and matrix.transposed):
            shown = "the transpose" if found == wanted else f"{list(found)}, not {list(wanted)}"
            raise CorruptFile(f"{source.folder}: {name} is {shown}, which does not fit the model")


def _read_experts(source: CheckpointSource, names: ExpertNames) -> Iterator[PackedExpert]:
    """The matrices of each expert; those that no sparse format made smaller are ordinary tensors."""

    def read(name: str) -> Packed:
        stored = f"{name}.weight"
        if stored in source.matrices:
            return source.matrices[stored].packed()
        return build_format("dense").pack(source.read([stored])[stored])

    for gate, up, down in names:
        yield read(gate), read(up), read(down)


def _spellings(model: nn.Module) -> tuple[Callable[[str], str], ...]:
    """From a name of the model to that in the checkpoint, or back; either may leave out the model's prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return str, lambda name: prefix + name, lambda name: name.removeprefix(prefix)


def _folder_of(shards: list[Path], model: str) -> Path:
    """The one folder of all shards: the model's own, when that is a folder and not a name."""
    folder = shards[0].parent
    outside = os.path.isdir(model) and not folder.resolve().is_relative_to(Path(model).resolve())
    if outside or any(path.parent != folder for path in shards):
        raise CorruptFile(f"{model}: the index names shards outside the model's folder")
    return folder


def _check_contents(model: Any, source: CheckpointSource, state: Mapping[str, Tensor]) -> None:
    """All that the model, whose tensors were `state`, reads is there in its shape and kind, and nothing else is."""
    used = StoredNames(model, source, family_of(model.config), state).stored()
    check_nothing_else(source, used, model.config)


def _check_complete(shards: list[Path]) -> None:
    """Every shard that the names speak of is in the index; what is not would be filled at random."""
    totals = {int(match[1]) for path in shards if (match := re.search(r"-of-(\d{5})\.safetensors$", path.name))}
    if totals != {len(shards)}:
        where = ", ".join({str(path.parent) for path in shards}) or "a packed checkpoint"
        raise CorruptFile(f"{where}: the index names {len(shards)} shards of {max(totals, default=0)}")


def _say_what_is_slow(reasons: Iterable[str | None]) -> None:
    """Warn of packed matrices that no compiled kernel multiplies, although there are compiled kernels."""
    if native.unavailable():
        return  # `sparity doctor` says so
    for reason, count in Counter(reason for reason in reasons if reason).items():
        log.warning("%d packed matrices are unpacked for every product, which is slow: %s", count, reason)
