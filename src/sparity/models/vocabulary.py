"""The two matrices of a model that are as long as its vocabulary: the embedding and the head, which may be one."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from sparity.errors import InvalidInput


@dataclass(frozen=True)
class Vocabulary:
    """Where the embedding and the head of a causal language model are.

    Attributes:
        embedding: the embedding's name in the model.
        head: the head's; None in a model without one.
        tied: whether the head's weight is the embedding's.
    """

    embedding: str
    head: str | None
    tied: bool

    @property
    def matrices(self) -> tuple[str, ...]:
        """The modules whose weights are matrices of their own."""
        return (self.embedding,) if self.tied or self.head is None else (self.embedding, self.head)


def vocabulary_of(model: Any) -> Vocabulary:
    """The embedding and the head of a transformers model, with or without memory for its weights.

    Raises:
        InvalidInput: its embedding does more than to look rows up, or its head is no linear layer.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise InvalidInput(f"an embedding of the kind {type(embedding).__name__} cannot be packed: leave it as it is")
    if not (head is None or isinstance(head, nn.Linear)):
        raise InvalidInput(
            f"a head of the kind {type(head).__name__} cannot be packed: leave the embeddings as they are"
        )
    names = {module: name for name, module in model.named_modules()}
    return Vocabulary(names[embedding], names.get(head), are_tied(model))


def are_tied(model: Any) -> bool:
    """Whether the head's weight is the embedding's, or will be once the model is loaded."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return False
    names = {module: name for name, module in model.named_modules()}
    return head.weight is embedding.weight or f"{names[head]}.weight" in model.all_tied_weights_keys


def forget_ties(model: Any) -> None:
    """Tell transformers that no parameters of a model are one: a packed weight is no parameter."""
    model._tied_weights_keys, model.all_tied_weights_keys = None, {}


def recall_ties(model: Any) -> None:
    """Undo `forget_ties`."""
    vars(model).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def tie_again(model: Any) -> None:
    """The same where the tied weights have been put in as parameters of their own: they become one."""
    recall_ties(model)
    model.tie_weights(recompute_mapping=False)
