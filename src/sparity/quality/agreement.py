"""How far a model's predictions moved from those of the dense model: KL divergence and top-1 agreement."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparity.processes.group import ALONE, Group
from sparity.quality.perplexity import exp, losses_of, split_windows, window_logits


@dataclass(frozen=True)
class Agreement:
    """Two models on the same text. KL is in nats per token, averaged over all predictions but each window's last."""

    dense_perplexity: float
    perplexity: float
    kl: float
    top1: float
    tokens: int


def compare(dense: Any, sparse: Any, token_ids: Any, window: int, group: Group = ALONE) -> Agreement:
    """Perplexity of both models, KL(dense || sparse) and the share of equal top-1 predictions, in one pass.

    The ranks of a group share the windows; each gets the result, the same as from one process.
    """
    windows = split_windows(dense, token_ids, window)
    count, mine = len(windows), [_compared(dense, sparse, ids) for ids in windows[group.rank :: group.size]]
    found = group.collected(mine)
    rows = [found[index % group.size][index // group.size] for index in range(count)]
    dense_loss, loss, divergence, agreement = (sum(column) / count for column in zip(*rows, strict=True))
    return Agreement(
        dense_perplexity=exp(dense_loss),
        perplexity=exp(loss),
        kl=divergence,
        top1=agreement,
        tokens=windows.numel() - count,
    )


def _compared(dense: Any, sparse: Any, ids: Tensor) -> tuple[float, float, float, float]:
    """Of one window: the losses of both models, the KL in nats per token, and the share of equal predictions."""
    reference, candidate = window_logits(dense, ids), window_logits(sparse, ids)
    p, q = reference[:-1].log_softmax(-1), candidate[:-1].to(reference.device).log_softmax(-1)
    return (
        float(losses_of(reference, ids).mean()),
        float(losses_of(candidate, ids).mean()),
        float((p.exp() * (p - q)).sum(-1).mean()),
        float((p.argmax(-1) == q.argmax(-1)).float().mean()),
    )


def grade(change: float) -> str:
    """A word for a relative change of perplexity: under 1 % excellent, 5 % good, 10 % acceptable, else poor."""
    for limit, word in ((0.01, "excellent"), (0.05, "good"), (0.10, "acceptable")):
        if change < limit:
            return word
    return "poor"
