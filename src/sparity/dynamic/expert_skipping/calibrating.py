"""From which weight on experts are skipped, found on text."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput, NumericalError
from sparity.models.cuts.experts import top_k

FEWEST = 2  # experts of a token


def check_routing(config: Any, experts: Mapping[str, Any]) -> None:
    """Refuse a model in which no expert can be skipped.

    Raises:
        InvalidInput: it has no experts, or a token visits one.
    """
    if not experts:
        raise InvalidInput(f'expert_skipping: a model of type "{config.model_type}" has no experts: leave it out')
    if top_k(config) < FEWEST:
        raise InvalidInput("expert_skipping: each token visits one expert in this model, which must stay: leave it out")


@torch.no_grad()
def found_thresholds(model: Any, experts: Mapping[str, nn.Module], tokens: Tensor, sparsity: float) -> dict[str, float]:
    """Of each block the share of a token's largest weight under which `sparsity` of its other weights lie.

    0.5 is the median. Everything else is computed as the model does; 0 for a sparsity of 0, without looking.

    Args:
        model: a transformers model, which is left as it was.
        experts: of `experts_of_sites`.
        tokens: `[samples, length]`.
        sparsity: in [0, 1).

    Raises:
        NumericalError: weights that are no numbers.
    """
    if not sparsity:
        return dict.fromkeys(experts, 0.0)
    found: dict[str, list[Tensor]] = {name: [] for name in experts}

    def note(shares: list[Tensor], module: nn.Module, arguments: tuple[Any, ...]) -> None:
        shares.append(shares_of_largest(arguments[2]).cpu())

    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with ExitStack() as open_:
            for name, module in experts.items():
                open_.callback(module.register_forward_pre_hook(partial(note, found[name])).remove)
            for sample in tokens.long()[:, None]:  # [1, length]
                model.base_model(input_ids=sample.to(device), use_cache=False)
    finally:
        model.train(training)
    return {name: _quantile(name, torch.cat(shares), sparsity) for name, shares in found.items()}


def shares_of_largest(weights: Tensor) -> Tensor:
    """The router's weights `[tokens, k]` but each token's largest, as shares of that: float32 `[tokens * (k - 1)]`."""
    first, *others = weights.float().sort(dim=-1, descending=True).values.unbind(-1)
    return torch.stack([other / first for other in others], -1).flatten()


def _quantile(name: str, shares: Tensor, sparsity: float) -> float:
    if not bool(shares.isfinite().all()):
        raise NumericalError(
            f"{name}: the router's weights hold NaN or infinite numbers; use a wider dtype (float32) or other text"
        )
    return float(np.quantile(shares.double().numpy(), sparsity))
