"""Which heads of a model look far back: found on random tokens that are repeated (arXiv:2407.15891)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparity.calibration import walk
from sparity.dynamic.cache.seen import Seen
from sparity.dynamic.cache.watching import watched
from sparity.errors import InvalidInput
from sparity.models import Decoder


def retrieval_heads(decoder: Decoder, policy: Any, whole: Sequence[bool]) -> list[Tensor]:
    """Of each block which KV heads are retrieval heads, bool `[kv_heads]`; none of blocks that do not see everything.

    Args:
        decoder: the model.
        policy: how they are found, a `RazorAttention`.
        whole: of each block whether it sees the whole text.

    Raises:
        InvalidInput: too few positions or words for tokens that are repeated.
    """
    echo, induction, groups = head_scores(decoder, policy)
    counted = torch.tensor(whole)
    chosen = highest_heads(echo, counted, policy.echo) | highest_heads(induction, counted, policy.induction)
    return [row.view(-1, group).any(-1) for row, group in zip(chosen, groups, strict=True)]


def head_scores(decoder: Decoder, policy: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Echo and induction of every query head, float32 `[blocks, heads]`, and how many of a block's share keys.

    The mean over the tokens of all repetitions but the first of what a head pays to earlier copies of its token, and
    to the tokens behind those copies.

    Raises:
        InvalidInput: see `retrieval_heads`.
    """
    ids = repeated_tokens(decoder.config, policy)
    found, groups = list[Tensor](), list[int]()

    def watch(module: nn.Module, states: tuple[Tensor, Tensor, Tensor], scaling: float, softcap: float | None) -> None:
        query, key = states[:2]
        groups.append(query.shape[1] // key.shape[1])
        found.append(paid_back(Seen(query, key, key, scaling, softcap), ids.shape[1] // policy.repeats))

    with watched(decoder.skeleton, watch), torch.no_grad():
        for visit in walk(decoder, decoder.inputs(ids)):
            visit.finish()
    scores = torch.stack(found)  # [blocks, heads, 2]
    return scores[..., 0], scores[..., 1], groups


def paid_back(seen: Seen, period: int) -> Tensor:
    """What heads pay to earlier copies of a token, and to those behind them, `[heads, 2]`, on a text of a period."""
    tokens = seen.tokens
    total = torch.zeros(seen.queries.shape[1], 2, dtype=torch.float64)
    first = 0
    for weights in seen.blocks():  # [1, kv_heads, group, queries, tokens]
        rows = weights[0].flatten(0, 1).double().cpu()
        places = torch.arange(first, first + rows.shape[1])
        back = places[:, None] - torch.arange(tokens)
        repeated = (places >= period)[:, None]
        total[:, 0] += (rows * (repeated & (back > 0) & (back % period == 0))).sum((1, 2))
        total[:, 1] += (rows * (repeated & (back > 0) & ((back + 1) % period == 0))).sum((1, 2))
        first += rows.shape[1]
    return (total / (tokens - period)).float()


def repeated_tokens(config: Any, policy: Any) -> Tensor:
    """Different random tokens, repeated, int64 `[1, tokens * repeats]`, as many as fit the model.

    Raises:
        InvalidInput: fewer than 8 fit.
    """
    positions = getattr(config, "max_position_embeddings", None) or policy.tokens * policy.repeats
    period = min(policy.tokens, int(positions) // policy.repeats, int(config.vocab_size))
    if period < 8 or policy.repeats < 2:
        raise InvalidInput(
            f"{policy.name}: {policy.repeats} repetitions of {period} tokens show no head that looks back: the model "
            f"has {positions} positions and {config.vocab_size} words; choose `tokens` and `repeats` anew"
        )
    drawn = torch.randperm(int(config.vocab_size), generator=torch.Generator().manual_seed(policy.seed))[:period]
    return drawn.repeat(policy.repeats)[None]


def highest_heads(scores: Tensor, counted: Tensor, share: float) -> Tensor:
    """The highest share of all heads of the blocks that count, bool `[blocks, heads]`; at least one of them if any."""
    order = scores.masked_fill(~counted[:, None], -torch.inf)
    many = int(counted.sum()) * scores.shape[1]
    count = max(round(share * many), 1 if share and many else 0)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[order.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return chosen.view(scores.shape)
