"""How much each head must compute for a stated error: `sparity.calibrate_attention`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparity.dynamic.attention.attaching import check_attention
from sparity.dynamic.attention.computing import Call, Choice
from sparity.dynamic.attention.functions import layout_of
from sparity.dynamic.attention.layouts.base import Layout
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.watching import watched
from sparity.errors import InvalidInput, wrong_input

STEPS, MOST = 7, 10.0  # halvings; shares are 1 - 2 ** -x for x up to MOST
BLOCKS = 4  # of queries that a text must have


@wrong_input()
def calibrate_attention(
    model: Any, input_ids: Any, *, method: str, error: float, block: int | Sequence[int] = 64, **options: Any
) -> list[Tensor]:
    """The least share of each head with which its output stays within an error, everything else computed densely.

    The error is the sum of `|dense - by blocks|` over that of `|dense|`, over all tokens of the texts and channels of
    the head, as SpargeAttn tunes its thresholds (Zhang et al. 2025, arXiv:2502.18137).

    Args:
        model: a Hugging Face causal language model whose attention is sdpa or eager; it is left as it was.
        input_ids: token ids of texts of one length, `[tokens]` or `[texts, tokens]`, read in one call; about as
            long as the prompts to come.
        method: of `sparity methods attention.layout`.
        error: as a share of the output, in (0, 1).
        block: tokens of a block, or `(queries, keys)`.
        options: the method's; its share is what is found.

    Returns:
        Of each layer float64 `[heads]`, for `shares` of `sparity.with_attention_blocks`: the method's share
        (`threshold`, `gamma`), and 1 for a head that is computed whole. Methods without a share have 0 where the error
        is kept. 1 also where attention is never by blocks (sliding windows).

    Raises:
        InvalidInput: an unknown method or option, an error that is none, or texts that are too short.
        UnsupportedModel: attention that does not go through transformers' interface.

    Example:
        >>> import sparity, torch
        >>> model, ids = sparity.load("zoo:llama"), torch.arange(512)[None]
        >>> shares = sparity.calibrate_attention(model, ids, method="spargeattn", error=0.05, block=32)
        >>> len(shares), shares[0].dtype
        (6, torch.float64)
    """
    layout, size = layout_of(method, block, options)
    ids = torch.as_tensor(input_ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        raise InvalidInput(f"input_ids must be texts [texts, tokens], got {ids.dtype} {list(ids.shape)}")
    check_attention(model)
    return found_shares(model, ids.long(), Choice(layout, size), error)


@torch.no_grad()
def found_shares(model: Any, ids: Tensor, choose: Choice, error: float) -> list[Tensor]:
    """See `calibrate_attention`; `ids` [texts, tokens]."""
    if isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error < 1:
        raise InvalidInput(f"error {error!r} must lie between 0 and 1")
    if ids.shape[1] < (least := BLOCKS * max(choose.size)):
        raise InvalidInput(
            f"texts of {ids.shape[1]} tokens are too short for blocks of {max(choose.size)}: give {least} or more"
        )
    config = model.config.get_text_config(decoder=True)
    found = [torch.ones(int(config.num_attention_heads), dtype=torch.float64) for _ in range(config.num_hidden_layers)]

    def watch(module: nn.Module, states: tuple[Tensor, Tensor, Tensor], scaling: float, cap: float | None) -> None:
        layer = getattr(module, "layer_idx", None) or 0
        if getattr(module, "sliding_window", None) is None:
            sight = Sight(None, len(ids), ids.shape[1], ids.shape[1])
            call = Call(*states, sight, scaling, {"softcap": cap, "s_aux": getattr(module, "sinks", None)}, plain=True)
            found[layer] = _share_of(call, choose, error).cpu()

    training = model.training
    model.eval()
    try:
        with watched(model, watch):
            model.base_model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        model.train(training)
    return found


def _share_of(call: Call, choose: Choice, error: float) -> Tensor:
    """float64 `[heads]`."""
    heads = call.query.shape[1]
    every = torch.ones(heads, dtype=torch.float64)
    dense = call.attend(_masks(call, choose.layout, choose.size, every), choose.size).float()
    size = dense.abs().sum((0, 1, 3)).clamp_min(torch.finfo(torch.float32).tiny)

    def fits(shares: Tensor) -> Tensor:
        part = call.attend(_masks(call, choose.layout, choose.size, shares), choose.size).float()
        return ((part - dense).abs().sum((0, 1, 3)) / size <= error).cpu()

    if choose.layout.share is None:
        return (~fits(torch.zeros_like(every))).double()
    low, high = torch.zeros_like(every), torch.full_like(every, MOST)
    within = fits(1 - 2**-high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        good = fits(1 - 2**-middle)
        low, high = low.where(good, middle), middle.where(good, high)
    return (1 - 2**-high).where(within, every)


def _masks(call: Call, layout: Layout, size: tuple[int, int], shares: Tensor) -> list[Tensor]:
    return list(Choice(layout, size, (shares,))(call.query, call.key, call.scaling, 0))
