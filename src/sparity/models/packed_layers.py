"""Packed matrices stand for the linear layers of their model, and a packed checkpoint holds nothing else besides."""

import copy
from collections.abc import Collection
from typing import Any, Protocol

import torch

from sparity.checkpoints.packed import StoredMatrix
from sparity.checkpoints.source import CheckpointSource, Source
from sparity.errors import CorruptFile
from sparity.models import transformers as hf


class Weights(Protocol):
    """What a model says of its matrices, see `Decoder`."""

    def linear_weights(self) -> dict[str, bool]:
        """Stored names of the blocks' matrices, and whether each is `[in, out]`."""

    def vocabulary_weights(self) -> tuple[str, ...]:
        """Stored names of the matrices of the embedding and of the head."""


def check_packed(source: Source, used: Collection[str], config: Any, weights: Weights) -> None:
    """Of a packed checkpoint, that the model has every matrix and no tensor is unknown; of others, nothing.

    Raises:
        CorruptFile: see the functions below.
    """
    if isinstance(source, CheckpointSource) and source.packed:
        check_layers(source, weights)
        check_nothing_else(source, used, config)


def check_layers(source: CheckpointSource, weights: Weights) -> None:
    """Every packed matrix is the weight of a linear layer, turned as that is, or one of the vocabulary, row by row.

    Args:
        source: a packed checkpoint.
        weights: of the model.

    Raises:
        CorruptFile: one is something else, or its transpose.
    """
    linear = weights.linear_weights()
    others = source.matrices.keys() - linear.keys()
    vocabulary = weights.vocabulary_weights() if others else ()
    linear |= dict.fromkeys(vocabulary, False)
    for stored, matrix in source.matrices.items():
        check_rows(matrix, stored in vocabulary)
        if stored not in linear:
            raise CorruptFile(f"{matrix.path}: {matrix.name} is packed as a linear layer, but is none in this model")
        if matrix.transposed != linear[stored]:
            found, wanted = ("[in, out]", "[out, in]") if matrix.transposed else ("[out, in]", "[in, out]")
            raise CorruptFile(
                f"{matrix.path}: {matrix.name} is packed as {found}, but is {wanted} in this model; fetch it again"
            )


def check_rows(matrix: StoredMatrix, vocabulary: bool) -> None:
    """Raise `CorruptFile` where a matrix of the vocabulary is in a format whose rows do not lie by themselves."""
    if vocabulary and matrix.entry["format"] != "dense":
        raise CorruptFile(
            f"{matrix.path}: {matrix.name} is packed as {matrix.entry['format']}, but an embedding or a head is stored "
            "row by row, as dense; pack the plain model again"
        )


def check_nothing_else(source: CheckpointSource, used: Collection[str], config: Any) -> None:
    """A packed checkpoint has no tensor that the model does not know, but those that it names as unused itself.

    Args:
        source: a packed checkpoint.
        used: the names of the tensors that a model which is loaded from it reads.
        config: of that model; what only the causal language model reads may be there too.

    Raises:
        CorruptFile: there is one.
    """
    more = set(source.shapes()) - set(used) - source.unused
    if not more:
        return
    whole = hf.empty_model(copy.deepcopy(config), torch.float32)
    prefix = f"{whole.base_model_prefix}."
    known = {spelled for name in whole.state_dict() for spelled in (name, name.removeprefix(prefix))}
    if unknown := sorted(more - known):
        raise CorruptFile(
            f"{source.folder} holds {len(unknown)} tensors that the model does not have, {unknown[0]} among them: it "
            "belongs to another configuration or is damaged; fetch or save the model again"
        )
