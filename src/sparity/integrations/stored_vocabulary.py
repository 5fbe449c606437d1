"""The embedding and the head of a checkpoint in which they are packed, put into a model that is being loaded."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparity.checkpoints.packed import StoredMatrix
from sparity.checkpoints.source import CheckpointSource
from sparity.engine.modules.embedding import PackedEmbedding, PackedHead
from sparity.errors import CorruptFile
from sparity.models import transformers as hf
from sparity.models.packed_layers import check_rows
from sparity.models.vocabulary import are_tied, vocabulary_of

Spellings = tuple[Callable[[str], str], ...]


@dataclass(frozen=True)
class Placed:
    """What stands in the model now and waits for its weights.

    Attributes:
        embedding: with its matrix; None where the embedding is not packed.
        head: with its matrix, which is the embedding's where they are tied; None where the head is not packed.
        names: of the matrices of the checkpoint that belong to the vocabulary, also of a head that the model lacks.
    """

    embedding: tuple[PackedEmbedding, StoredMatrix] | None
    head: tuple[PackedHead, StoredMatrix] | None
    names: set[str]

    def give(self) -> None:
        """Read the weights, a tied one once."""
        if self.embedding is not None:
            self.embedding[0].give(self.embedding[1].packed())
        if self.head is not None:
            if self.embedding is not None and self.embedding[1] is self.head[1]:
                self.head[0].share(self.embedding[0])
            else:
                self.head[0].give(self.head[1].packed())


def place_vocabulary(model: Any, source: CheckpointSource, spellings: Spellings) -> Placed:
    """Put a `PackedEmbedding` and a `PackedHead` where the checkpoint has them packed.

    Args:
        model: without memory for its weights; tied parameters are one.
        source: the checkpoint.
        spellings: from a name in the model to those that the checkpoint may have.

    Raises:
        CorruptFile: a matrix does not fit the model.
    """
    layer, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    found = _stored(source, names.get(layer), spellings)
    embedding = None
    if found is not None:
        _check(found, layer, nn.Embedding)
        embedding = PackedEmbedding.like(layer, found.name), found
        _put(model, names[layer], embedding[0])
    own = _stored(source, names.get(head), spellings) or (found if are_tied(model) else None)
    placed = None
    if own is not None:
        _check(own, head, nn.Linear)
        placed = PackedHead.like(head, own.name), own
        _put(model, names[head], placed[0])
    matrices = {matrix.name for matrix in (found, own) if matrix is not None}
    return Placed(embedding, placed, matrices if head is not None else matrices | set(_of_missing_head(model, source)))


def _stored(source: CheckpointSource, name: str | None, spellings: Spellings) -> StoredMatrix | None:
    """The matrix of a module of the model, where it is packed."""
    spelled = () if name is None else (f"{spell(name)}.weight" for spell in spellings)
    return next((source.matrices[stored] for stored in spelled if stored in source.matrices), None)


def _of_missing_head(model: Any, source: CheckpointSource) -> Iterator[str]:
    """Names of packed matrices that are the head's in a model which was loaded without one."""
    known = {name for name, _ in model.named_modules()}
    for matrix in source.matrices.values():
        if matrix.name.removeprefix(f"{model.base_model_prefix}.") in known:
            continue
        whole = hf.empty_model(copy.deepcopy(model.config), torch.float32)
        yield from (name for name in vocabulary_of(whole).matrices if f"{name}.weight" in source.matrices)
        return


def _check(matrix: StoredMatrix, original: Any, kind: type[nn.Module]) -> None:
    check_rows(matrix, vocabulary=True)
    if not isinstance(original, kind) or matrix.transposed or tuple(original.weight.shape) != matrix.shape:  # type: ignore[arg-type]
        rows, columns = matrix.entry["shape"]
        raise CorruptFile(f"{matrix.path}: {matrix.name} is packed as {rows} x {columns}, which does not fit the model")


def _put(model: Any, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
