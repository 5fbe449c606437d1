"""How far a model's predictions moved from those of the dense model: KL divergence and top-1 agreement."""

from dataclasses import dataclass
from typing import Any

from sparity.quality.perplexity import exp, losses_of, split_windows, window_logits


@dataclass(frozen=True)
class Agreement:
    """Two models on the same text. KL is in nats per token, averaged over all predictions but each window's last."""

    dense_perplexity: float
    perplexity: float
    kl: float
    top1: float
    tokens: int


def compare(dense: Any, sparse: Any, token_ids: Any, window: int) -> Agreement:
    """Perplexity of both models, KL(dense || sparse) and the share of equal top-1 predictions, in one pass."""
    windows = split_windows(dense, token_ids, window)
    dense_losses, sparse_losses, divergences, agreements = [], [], [], []
    for ids in windows:
        reference, candidate = window_logits(dense, ids), window_logits(sparse, ids)
        dense_losses.append(float(losses_of(reference, ids).mean()))
        sparse_losses.append(float(losses_of(candidate, ids).mean()))
        p, q = reference[:-1].log_softmax(-1), candidate[:-1].to(reference.device).log_softmax(-1)
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
        agreements.append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    count = len(windows)
    return Agreement(
        dense_perplexity=exp(sum(dense_losses) / count),
        perplexity=exp(sum(sparse_losses) / count),
        kl=sum(divergences) / count,
        top1=sum(agreements) / count,
        tokens=windows.numel() - count,
    )


def grade(change: float) -> str:
    """A word for a relative change of perplexity: under 1 % excellent, 5 % good, 10 % acceptable, else poor."""
    for limit, word in ((0.01, "excellent"), (0.05, "good"), (0.10, "acceptable")):
        if change < limit:
            return word
    return "poor"
