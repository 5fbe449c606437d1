"""How much each block's cache keeps, or each head's, by what it costs when that alone keeps less."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sparity.budgets.optimum.multiple_choice import multiple_choice
from sparity.dynamic.cache.attaching import RECENT, SINKS, attached, check_model, run_of
from sparity.dynamic.cache.converting import layers_of
from sparity.dynamic.cache.layer import PolicyLayer
from sparity.dynamic.cache.learned import Learned, Sizes
from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.roles import Roles, Spec, roles
from sparity.dynamic.cache.run import Run, Share
from sparity.dynamic.cache.sight import Sight
from sparity.errors import InvalidInput, wrong_input

PARTS = 4  # of the mean share, in which shares are counted


@wrong_input()
def cache_budgets(
    model: Any,
    input_ids: Any,
    *,
    policy: Spec,
    keep: float,
    by: Literal["block", "head"] = "block",
    ahead: int = 16,
    levels: Sequence[int] = (1, 2, 4, 6, 8),
    sinks: int = SINKS,
    recent: int = RECENT,
    learned: Learned | None = None,
) -> list[float | list[float]]:
    """Shares of the cache for each block, or for each KV head, that hold no more of these texts than `keep` everywhere.

    Each text but its last `ahead` tokens is read with one block, or head, that keeps a share and all others whole; what
    that costs is the KL divergence from the model with the whole cache, over those last tokens. The shares chosen have
    the least sum of costs of all that are allowed. Costs are taken to add up, and a share that comes to fewer tokens
    than are protected counts as those.

    Args:
        model: a Hugging Face causal language model.
        input_ids: token ids of texts, `[tokens]` or `[texts, tokens]`.
        policy: of `sparity methods cache.policy`, or `{name: options}`, one whose budgets are the share asked for.
        keep: the mean share, in (0, 1).
        by: what has a share of its own, `block` or `head`; heads only of policies in which each chooses by itself.
        ahead: tokens of each text by which costs are measured.
        levels: shares that are tried, in quarters of `keep`; 4 must be one of them. None is above 1.
        sinks: see `sparity.cache`.
        recent: see there.
        learned: see there.

    Returns:
        A share per block, or a list of its heads' shares, for `sparity.cache(model, policy, keep=...)` and the stage
        `cache`; 1 for blocks whose cache does not hold the whole text, which count for nothing.

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
    ids = torch.as_tensor(input_ids)
    ids = ids[None] if ids.ndim == 1 else ids
    _check(found, ids, keep, by, ahead, levels)
    whole = list(layers_of(model))
    units = sorted({min(int(level), int(PARTS / keep)) for level in levels})
    heads = Sizes.of(model.config.get_text_config(decoder=True)).kv_heads if by == "head" else None
    cells = [(index, head) for index, sees in enumerate(whole) if sees for head in range(heads or 1)]
    asked = [[_asked(len(whole), cell, heads, unit * keep / PARTS) for unit in units] for cell in cells]
    run = run_of(model, found, [1.0] * len(whole), learned, sinks=sinks, recent=recent, every=1, decode=False)
    with attached(model, run), torch.no_grad():
        measured = [_costs(model, run, row.to(model.device), ahead, cells, asked) for row in ids]
    costs = torch.tensor(measured, dtype=torch.float64).mean(0).tolist()
    sizes = [-_held(run, unit * keep / PARTS, ids.shape[1] - ahead) for unit in units]
    places = multiple_choice(costs, [sizes] * len(costs), len(costs) * sizes[units.index(PARTS)])
    assert places is not None, "the mean is allowed everywhere"
    chosen = iter(places)
    shares = [[units[next(chosen)] * keep / PARTS for _ in range(heads or 1)] if sees else 1.0 for sees in whole]
    return [share if heads or not isinstance(share, list) else share[0] for share in shares]


def _check(found: Roles, ids: Tensor, keep: float, by: str, ahead: int, levels: Sequence[int]) -> None:
    """Refuse what cannot be measured; raises `InvalidInput`."""
    policy = found.policy
    own = type(policy).budget is not Policy.budget or policy.rereads  # blocks share one budget there
    if own or found.codec or found.reader:
        raise InvalidInput(f"{policy.name} does not keep the share that it is asked for: budgets cannot be measured")
    if by not in ("block", "head") or (by == "head" and not policy.by_head):
        raise InvalidInput(f"by {by!r} must be block, or head for policies in which each head chooses by itself")
    if ids.ndim != 2 or ids.is_floating_point() or ahead < 1 or ids.shape[1] < ahead + 2 or not len(ids):
        raise InvalidInput(
            f"input_ids must be texts of more than {ahead + 1} tokens, [texts, tokens], got {list(ids.shape)}"
        )
    if not 0 < keep < 1 or PARTS not in levels or any(isinstance(n, bool) or int(n) != n or n < 1 for n in levels):
        raise InvalidInput(f"keep {keep} must lie in (0, 1), and levels {list(levels)} be whole numbers with {PARTS}")


def _asked(layers: int, cell: tuple[int, int], heads: int | None, share: float) -> list[Share]:
    """Shares of all layers where one cell keeps less, and everything else whole."""
    own = share if heads is None else tuple(share if head == cell[1] else 1.0 for head in range(heads))
    return [own if index == cell[0] else 1.0 for index in range(layers)]


def _held(run: Run, share: float, tokens: int) -> float:
    """What a share of a text comes to, of which no fewer tokens stay than are protected."""
    return min(max(share, sum(run.protected(int(share * tokens))) / tokens), 1.0)


@dataclass
class _Queries:
    """What layers are asked by a prompt, of which nothing is evicted yet."""

    calls: dict[int, tuple[nn.Module, Tensor, Sight, float, float | None]] = field(default_factory=dict)

    def see(self, layer: PolicyLayer, module: nn.Module, query: Tensor, scaling: float, softcap: float | None) -> None:
        """Attention of a layer has read."""
        layer.waiting = False
        sight = Sight(None, query.shape[0], query.shape[2], layer.length)
        self.calls[layer.index] = (module, query, sight, scaling, softcap)


def _costs(
    model: Any, run: Run, ids: Tensor, ahead: int, cells: Sequence[tuple[int, int]], asked: Sequence[list[list[Share]]]
) -> list[list[float]]:
    """KL from the whole cache of one text `[tokens]`, in nats per token, by cell and what is `asked` of it."""
    past, queries = DynamicCache(config=model.config.get_text_config(decoder=True)), _Queries()
    run.reading = queries
    try:
        model(input_ids=ids[None, :-ahead], past_key_values=past, logits_to_keep=1)
    finally:
        run.reading = None
    dense = _logits(model, ids[-ahead:], copy.deepcopy(past))
    found = list[list[float]]()
    for layer, _ in cells:
        row = list[float]()
        for run.keep in asked[len(found)]:
            left = copy.deepcopy(past)
            left.layers[layer].read(*queries.calls[layer])
            sparse = _logits(model, ids[-ahead:], left)
            row.append(float((dense.exp() * (dense - sparse)).sum(-1).mean()))
        found.append(row)
    return found


def _logits(model: Any, ids: Tensor, past: DynamicCache) -> Tensor:
    """Log-probabilities after each of some tokens `[ahead]`, `[ahead, words]`."""
    logits: Tensor = model(input_ids=ids[None], past_key_values=past).logits
    return logits[0].float().log_softmax(-1)
