"""The contenders of a benchmark: models held and computed in different ways, all in bfloat16 on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sparity.checkpoints.source import CheckpointSource
from sparity.checkpoints.weight_files import is_read_packed, weight_files
from sparity.engine.attach import attach
from sparity.engine.decoding.model import declines, disable_fast_path
from sparity.engine.modules.embedding import PackedEmbedding
from sparity.engine.modules.experts import PackedExperts
from sparity.engine.modules.linear import PackedLinear
from sparity.engine.modules.packed_matrix import HoldsMatrix
from sparity.errors import InvalidInput
from sparity.models import transformers as hf
from sparity.models.loading import load
from sparity.models.vocabulary import tie_again

How = Literal["engine", "dense", "transformers"]
COMPUTED: dict[How, str] = {
    "engine": "engine",
    "dense": "engine, the same weights held dense",
    "transformers": "transformers, the same weights held dense",
}


@dataclass(frozen=True)
class Contender:
    """A model folder and how it is run."""

    name: str
    folder: Path
    how: How

    @property
    def computed(self) -> str:
        """How, in words."""
        if self.how != "engine":
            return COMPUTED[self.how]
        layout = "packed" if is_read_packed(self.folder) else "a plain checkpoint, packed when loaded"
        return f"engine, {layout}"

    def open(self) -> Any:
        """The model, ready to generate; held dense, it is without the stages at run time.

        Raises:
            CorruptFile, InvalidInput, UnsupportedModel: see `load` and `attach`.
        """
        model = load(self.folder, dtype="bfloat16", runtime=self.how == "engine")
        if self.how == "engine":
            return attach(model)
        disable_fast_path(model)
        hold_dense(model)
        return attach(model, form="dense") if self.how == "dense" else model


def contenders(model: str, against: Sequence[str]) -> list[Contender]:
    """The opponents as they are named, and the model itself last.

    Raises:
        InvalidInput: no such model, or a name twice.
    """
    folder = hf.locate(model)
    named = [
        Contender(name, folder, "dense" if name == "dense" else "transformers")
        if name in ("dense", "transformers")
        else Contender(name, hf.locate(name), "engine")
        for name in against
    ]
    every = [*named, Contender(model, folder, "engine")]
    names = [contender.name for contender in every]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidInput(f"bench: {twice} is named twice: each contender is measured once")
    return every


def stored_bytes(contender: Contender) -> int:
    """About how many bytes of weights a contender will hold, before it is loaded."""
    source = CheckpointSource(contender.folder)
    if contender.how == "engine" and source.packed:
        return sum(path.stat().st_size for path in weight_files(contender.folder).shards)
    return sum(torch.Size(shape).numel() * torch.bfloat16.itemsize for shape in source.shapes().values())


def held_bytes(model: nn.Module) -> int:
    """The bytes of a model's weights and buffers in memory; what is shared counts once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    packed = {id(layer.packed): layer.packed.nbytes for layer in model.modules() if isinstance(layer, HoldsMatrix)}
    experts = sum(layer.nbytes for layer in model.modules() if isinstance(layer, PackedExperts))
    return sum(tensors.values()) + sum(packed.values()) + experts


def hold_dense(model: nn.Module) -> None:
    """Put transformers' own modules with the same weights in the place of every packed layer and of packed experts."""
    packed = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]
    for name, layer in packed:
        with torch.device("meta"):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight = nn.Parameter(layer.weight, requires_grad=False)
        if layer.bias is not None:
            dense.bias = layer.bias
        _put(model, name, dense)
    for name, packed_rows in [found for found in model.named_modules() if isinstance(found[1], PackedEmbedding)]:
        with torch.device("meta"):
            rows = nn.Embedding(packed_rows.num_embeddings, packed_rows.embedding_dim)
        rows.weight = nn.Parameter(packed_rows.weight, requires_grad=False)
        _put(model, name, rows)
        tie_again(model)
    for name, experts in [found for found in model.named_modules() if isinstance(found[1], PackedExperts)]:
        with torch.device("meta"):
            fused = experts.kind(experts.config)
        for parameter, weight in experts.dense().items():
            setattr(fused, parameter, nn.Parameter(weight, requires_grad=False))
        _put(model, name, fused.train(experts.training))


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)


def slow_note(contender: Contender, model: Any) -> str | None:
    """A sentence about a model that the engine cannot decode on its fast path."""
    reason = declines(model) if contender.how != "transformers" else None
    return f"{contender.name} does not decode on the engine's fast path: {reason}." if reason else None
