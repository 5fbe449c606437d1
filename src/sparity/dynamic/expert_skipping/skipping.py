"""Experts that are skipped while a model runs: what stays of a token's experts, and hooks around their module.

A module of experts is called with one row for each token and each of its experts that stays, and what it gives is
summed for each token. So it works around transformers' modules whatever computes their products, around packed experts
and around those on disk, and none of them reads an expert that no token needs.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models import InputSite


def experts_of_sites(sites: Sequence[InputSite]) -> dict[str, nn.Module]:
    """Name of a block's experts, as checkpoints call them -> the module that holds them all; dense blocks have none."""
    every = (projection for site in sites for projection in site.projections if projection.expert is not None)
    return {projection.name.rsplit(".", 2)[0]: projection.module for projection in every}


def kept_experts(weights: Tensor, threshold: float) -> Tensor:
    """Which of each token's experts stay: those that weigh at least `threshold` times as much as its first.

    `weights` [tokens, k] are the router's. Bool like them; everything stays of a token with a weight that is NaN.
    """
    shown = weights.float()
    return ~(shown < threshold * shown.amax(-1, keepdim=True))


def weights_of_kept(weights: Tensor, kept: Tensor) -> Tensor:
    """The router's weights `[tokens, k]` when those that are kept also carry what the others of their token did.

    A token that keeps all has the bits that it had; what is not kept is 0.
    """
    total = weights.float()
    left = total * kept
    return (left * (total.sum(-1, keepdim=True) / left.sum(-1, keepdim=True))).to(weights.dtype)


def normalises(experts: Any) -> bool:
    """Whether the router in front of a module of experts divides a token's weights by their sum."""
    return bool(getattr(experts.config, "norm_topk_prob", True))


class ExpertSkip:
    """The hooks before and behind one module of experts.

    Args:
        threshold: as of `kept_experts`.
        normalised: whether the router's weights of a token are divided by their sum: then they still are.
    """

    def __init__(self, threshold: float, normalised: bool) -> None:
        self.threshold, self.normalised = threshold, normalised
        self._call = _Call()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertSkip":
        return ExpertSkip(self.threshold, self.normalised)

    @contextmanager
    def around(self, experts: nn.Module) -> Iterator[None]:
        """Skip in calls of `experts` until the context closes."""
        with ExitStack() as open_:
            open_.callback(experts.register_forward_pre_hook(self._before).remove)
            open_.callback(experts.register_forward_hook(self._after).remove)
            yield

    def by_token(self, rows: Tensor) -> Tensor:
        """`rows` [kept pairs, n] of the running call, summed for each of its tokens `[tokens, n]`."""
        total = rows.new_zeros(self._call.count, rows.shape[-1])
        return total.index_add(0, self._call.tokens, rows)

    def _before(self, experts: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, chosen, weights, *others = arguments  # [tokens, hidden], [tokens, k], [tokens, k]
        kept = kept_experts(weights, self.threshold)
        weights = weights_of_kept(weights, kept) if self.normalised else weights
        tokens, places = kept.nonzero(as_tuple=True)
        self._call.tokens, self._call.count = tokens, len(hidden)
        return hidden[tokens], chosen[tokens, places, None], weights[tokens, places, None], *others

    def _after(self, experts: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        wide = torch.promote_types(output.dtype, torch.float32)
        return self.by_token(output.to(wide)).to(output.dtype)


class _Call(threading.local):
    """The call that is running in this thread: of which token each row is, and how many tokens there are."""

    tokens: Tensor
    count: int


def skip_of(experts: nn.Module) -> ExpertSkip | None:
    """What skips in a module of experts; None where nothing does."""
    owners = (getattr(hook, "__self__", None) for hook in experts._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, ExpertSkip)), None)


@contextmanager
def skipping(experts: Mapping[str, nn.Module], thresholds: Mapping[str, float]) -> Iterator[None]:
    """Skip experts of a model, or of one block, until the context closes; where the threshold is 0 nothing is touched.

    Args:
        experts: of `experts_of_sites`.
        thresholds: of the same names.

    Raises:
        InvalidInput: experts are skipped already.
    """
    if busy := next((name for name, module in experts.items() if skip_of(module)), None):
        raise InvalidInput(f"{busy}: experts are skipped in this model already: close that context first")
    with ExitStack() as open_:
        for name, module in experts.items():
            if thresholds[name] > 0:
                open_.enter_context(ExpertSkip(thresholds[name], normalises(module)).around(module))
        yield
