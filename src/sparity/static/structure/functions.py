"""Structured pruning without a recipe: scores, cuts, and methods as published."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparity import registry
from sparity.errors import InvalidInput, UnsupportedModel, wrong_input
from sparity.models.cuts.whole import cut_model
from sparity.models.transformers import check_vocabulary
from sparity.static.structure.methods.base import Method
from sparity.static.structure.subject import Subject, check_tokens


@wrong_input()
def structure_scores(model: nn.Module, token_ids: Any, *, method: str, **options: Any) -> dict[str, Tensor]:
    """What a method thinks of the parts of a model.

    Args:
        model: a Hugging Face causal language model; it is not changed.
        token_ids: calibration text, `[samples, length]`; None for a method that reads none.
        method: of `sparity methods structure.method`.
        options: the method's.

    Returns:
        Dimension -> float32 `[blocks, size]`, of the `depth` `[blocks]`; higher is kept. NaN stands where a block has
        fewer units than another. Where all blocks share the units (`hidden_size`), their rows are equal.

    Raises:
        InvalidInput: an unknown method or option, tokens that are none of the model's, parts that the model lacks.

    Example:
        >>> import sparity, torch
        >>> model = sparity.load("zoo:llama", dtype="float32")
        >>> scores = sparity.structure_scores(model, torch.arange(64).view(2, 32), method="shortgpt")
        >>> scores["depth"].shape
        torch.Size([6])
    """
    built, subject = _ready(model, token_ids, method, options)
    return built.scores(subject)


@wrong_input()
def cut(model: nn.Module, kept: Mapping[str, Any]) -> nn.Module:
    """A copy of a model with only some of its parts, in smaller shapes.

    Its logits are those of the model with the same parts set to zero.

    Args:
        model: a Hugging Face causal language model; it is not changed.
        kept: dimension -> the indices that stay, in order, for each block (None for a block that keeps all):
            `mlp_channels` (of expert E `mlp_channels.E`), `query_heads`, `kv_groups`, `experts`. The whole model shares
            one vector of `hidden_size`, `depth` and `attention` (the blocks whose attention is not silenced).

    Returns:
        The smaller model. Where blocks have different sizes it works, but no stock configuration can say what it is.

    Raises:
        InvalidInput: indices that choose no parts of the model, or what no model of its kind can be.

    Example:
        >>> import sparity
        >>> model = sparity.load("zoo:llama")
        >>> smaller = sparity.cut(model, {"mlp_channels": [range(256)] * 6, "depth": [0, 1, 4, 5]})
        >>> smaller.config.intermediate_size, smaller.config.num_hidden_layers
        (256, 4)
    """
    _check_model(model)
    return cut_model(model, kept)


@wrong_input()
def restructure(model: nn.Module, token_ids: Any, *, method: str, sparsity: float, **options: Any) -> nn.Module:
    """Make a model smaller by a method as published: choose, cut, and whatever it does to the weights that stay.

    Args:
        model: a Hugging Face causal language model; it is not changed.
        token_ids: calibration text, `[samples, length]`; None for a method that reads none.
        method: of `sparity methods structure.method`.
        sparsity: the share to remove, in [0, 1); of what, the method's page says.
        options: the method's.

    Returns:
        The smaller model.

    Raises:
        InvalidInput: an unknown method or option, a sparsity out of range, shapes that no model of its kind can have.

    Example:
        >>> import sparity, torch
        >>> model = sparity.load("zoo:llama", dtype="float32")
        >>> smaller = sparity.restructure(model, torch.arange(64).view(2, 32), method="shortgpt", sparsity=0.34)
        >>> smaller.config.num_hidden_layers
        4
    """
    built, subject = _ready(model, token_ids, method, options)
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise InvalidInput(f"sparsity {sparsity!r} must lie in [0, 1): to remove everything leaves no model")
    return built.restructure(subject, float(sparsity)).model


def _ready(model: nn.Module, token_ids: Any, method: str, options: Mapping[str, Any]) -> tuple[Method, Subject]:
    _check_model(model)
    built: Method = registry.create("structure.method", method, options)
    tokens = check_tokens(token_ids)
    if tokens is not None:
        check_vocabulary(tokens, model.config, "token_ids")
    elif built.needs_text:
        raise InvalidInput(f"{method} reads text: give token ids [samples, length]")
    return built, Subject(model, tokens)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnsupportedModel(
            f"a Hugging Face causal language model in memory is needed, not {type(model).__name__}: sparity.load(PATH)"
        )
