"""How far a model that skips activations is from the dense one: KL of the next token."""

from typing import Any

import torch
from torch import Tensor

from sparity.engine.modules.skips import SparseTokens
from sparity.products.float32 import float32_products


def divergence(model: Any, skipping: SparseTokens, ids: Tensor) -> Tensor:
    """KL(dense || sparse) in nats per token, `[]`: of all predictions but the last one of each sequence.

    Args:
        model: a transformers causal language model, which skips activations.
        skipping: what says which of its tokens are sparse.
        ids: `[samples, length]`, handed in without a cache.
    """
    ids = ids.to(next(model.parameters()).device)
    with float32_products():
        with torch.no_grad(), skipping.dense():
            dense = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        sparse = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    found: Tensor = (dense.exp() * (dense - sparse)).sum(-1).mean()
    return found
