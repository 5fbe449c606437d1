"""How much each block's cache keeps, by what it costs when that block alone keeps less: `sparity.cache_budgets`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sparity.dynamic.cache.attaching import RECENT, SINKS, attached, check_model, run_of
from sparity.dynamic.cache.converting import layers_of
from sparity.dynamic.cache.learned import Learned
from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.roles import Spec, roles
from sparity.errors import InvalidInput, wrong_input

PARTS = 4  # of the mean share, in which shares are counted


@wrong_input()
def cache_budgets(
    model: Any,
    input_ids: Any,
    *,
    policy: Spec,
    keep: float,
    ahead: int = 16,
    levels: Sequence[int] = (1, 2, 4, 6, 8),
    sinks: int = SINKS,
    recent: int = RECENT,
    learned: Learned | None = None,
) -> list[float]:
    """Shares of the cache for each block, of which the mean is `keep` at most.

    Each text but its last `ahead` tokens is read with one block that keeps a share and all others whole; what that
    costs is the KL divergence from the model with the whole cache, over those last tokens. The shares chosen have
    the least sum of costs of all that the mean allows. Costs are taken to add up.

    Args:
        model: a Hugging Face causal language model.
        input_ids: token ids of texts, `[tokens]` or `[texts, tokens]`.
        policy: of `sparity methods cache.policy`, or `{name: options}`, one whose budgets are the share asked for.
        keep: the mean share, in (0, 1).
        ahead: tokens of each text by which costs are measured.
        levels: shares that are tried, in quarters of `keep`; 4 must be one of them. None is above 1.
        sinks: see `sparity.cache`.
        recent: see there.
        learned: see there.

    Returns:
        A share per block for `sparity.cache(model, policy, keep=...)` and the stage `cache`; 1 for blocks whose cache
        does not hold the whole text, which count for nothing.

    Raises:
        InvalidInput: texts that are too short, or a request that makes no sense.

    Example:
        >>> import sparity, torch
        >>> model, ids = sparity.load("zoo:llama"), torch.arange(100, 228)[None]
        >>> keep = sparity.cache_budgets(model, ids, policy="streaming_llm", keep=0.5, ahead=8)
        >>> len(keep), sum(keep) <= 6 * 0.5
        (6, True)
    """
    found = roles(policy, keep, sinks=sinks, recent=recent)
    check_model(model)
    own = type(found.policy).budget is not Policy.budget or found.policy.rereads  # blocks share one budget there
    if own or found.codec or found.reader:
        raise InvalidInput(
            f"{found.policy.name} does not keep the share that it is asked for: budgets cannot be measured"
        )
    ids = torch.as_tensor(input_ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.is_floating_point() or ahead < 1 or ids.shape[1] < ahead + 2 or not len(ids):
        raise InvalidInput(
            f"input_ids must be texts of more than {ahead + 1} tokens, [texts, tokens], got {list(ids.shape)}"
        )
    if not 0 < keep < 1 or PARTS not in levels or any(isinstance(n, bool) or int(n) != n or n < 1 for n in levels):
        raise InvalidInput(f"keep {keep} must lie in (0, 1), and levels {list(levels)} be whole numbers with {PARTS}")
    whole = list(layers_of(model))
    units = sorted({min(int(level), int(PARTS / keep)) for level in levels})
    dense, costs = _logits(model, ids, ahead), list[list[float]]()
    for index, sees in enumerate(whole):
        shares = [[unit * keep / PARTS if i == index else 1.0 for i in range(len(whole))] for unit in units]
        if sees:
            costs.append([_cost(model, found, each, learned, dense, ids, ahead, sinks, recent) for each in shares])
    chosen = iter(cheapest(costs, units, PARTS * len(costs)))
    return [next(chosen) * keep / PARTS if sees else 1.0 for sees in whole]


def cheapest(costs: Sequence[Sequence[float]], units: Sequence[int], most: int) -> list[int]:
    """Of each item one of `units`, `most` in all at the most, with the least sum of `costs` [items][units].

    Of equal sums the one that gives earlier items less.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for each in costs:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (cost, taken) in best.items():
            for unit, more in zip(units, each, strict=True):
                total, candidate = used + unit, (cost + more, (*taken, unit))
                if total <= most and (total not in longer or candidate < longer[total]):
                    longer[total] = candidate
        best = longer
    return list(min(best.values())[1])


def _cost(
    model: Any,
    found: Any,
    keep: list[float],
    learned: Learned | None,
    dense: Tensor,
    ids: Tensor,
    ahead: int,
    sinks: int,
    recent: int,
) -> float:
    """KL from the whole cache, in nats per token, where blocks keep these shares."""
    run = run_of(model, found, keep, learned, sinks=sinks, recent=recent, every=1, decode=False)
    with attached(model, run):
        sparse = _logits(model, ids, ahead)
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


def _logits(model: Any, ids: Tensor, ahead: int) -> Tensor:
    """Log-probabilities after the last `ahead` tokens, read in a call of their own, `[texts, ahead, words]`."""
    found = []
    with torch.no_grad():
        for row in ids.to(model.device):
            past = DynamicCache(config=model.config.get_text_config(decoder=True))
            model(input_ids=row[None, :-ahead], past_key_values=past, logits_to_keep=1)
            found.append(model(input_ids=row[None, -ahead:], past_key_values=past).logits.float().log_softmax(-1))
    return torch.cat(found)
