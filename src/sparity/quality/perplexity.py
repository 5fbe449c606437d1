"""Perplexity by the protocol that the pruning papers share."""

import math
from typing import Any

import torch
from torch import Tensor

from sparity.errors import InvalidInput, wrong_input
from sparity.models import transformers as hf
from sparity.products.float32 import float32_products


@wrong_input()
def perplexity(model: Any, token_ids: Any, window: int = 2048) -> float:
    """exp of the mean token loss over independent windows of `token_ids`; nothing is prepended, the tail is dropped.

    Each window of L tokens gives L-1 predictions (GPTQ's protocol, kept by SparseGPT and Wanda).

    Args:
        model: a Hugging Face causal language model.
        token_ids: 1-D token ids: a list, array or tensor.
        window: tokens per window.

    Raises:
        InvalidInput: ids that are not 1-D, a text shorter than one window, or a window longer than the model's context.

    Example:
        >>> import sparity
        >>> from transformers import AutoTokenizer
        >>> model = sparity.load("zoo:llama")
        >>> tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        >>> ids = tokenizer("The with statement is used to wrap the execution of a block. " * 20)["input_ids"]
        >>> round(sparity.perplexity(model, ids, window=128), 1)
        11.5
    """
    losses = [float(token_losses(model, ids).mean()) for ids in split_windows(model, token_ids, window)]
    return exp(sum(losses) / len(losses))


def split_windows(model: Any, token_ids: Any, window: int) -> Tensor:
    """Windows `[windows, window]` of 1-D ids for a model; see `perplexity` for the errors."""
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"token ids must be 1-D integers, got {type(token_ids).__name__} ({error})") from error
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InvalidInput(f"token ids must be 1-D integers, got {ids.dtype} of shape {list(ids.shape)}")
    ids = ids.long()  # some unsigned types have no minimum
    context = getattr(model.config, "max_position_embeddings", None)
    if window < 2 or (context and window > context):
        raise InvalidInput(
            f"window {window}: it must be at least 2 and at most the model's context of {context} tokens"
        )
    if len(ids) < window:
        raise InvalidInput(f"the text has {len(ids)} tokens, less than one window of {window}: use a smaller window")
    vocabulary = model.config.vocab_size
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InvalidInput(f"token ids run from {low} to {high}, but the model's vocabulary has {vocabulary} tokens")
    return ids[: len(ids) // window * window].reshape(-1, window)


def exp(loss: float) -> float:
    """exp of a mean loss; infinite where the number would be too large."""
    return math.inf if loss > 700 else math.exp(loss)


def window_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits `[window, vocabulary]` of one window, in float32."""
    device = next(model.parameters()).device
    with torch.no_grad(), hf.named_outputs(model), float32_products():
        logits: Tensor = model(input_ids=ids[None].to(device), use_cache=False).logits[0]
    return logits.float()


def token_losses(model: Any, ids: Tensor) -> Tensor:
    """Cross-entropy `[window - 1]` of each token after the first, in nats."""
    return losses_of(window_logits(model, ids), ids)


def losses_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy `[window - 1]` from logits `[window, vocabulary]`."""
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:].to(logits.device), reduction="none")
