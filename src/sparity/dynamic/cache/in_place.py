"""Attention to what a cache holds by the compiled kernels, which read it where it lies."""

from typing import Any

import torch
from torch import Tensor

from sparity.dynamic.cache.merged_store import MergedStore
from sparity.dynamic.cache.pages import PagedStore
from sparity.dynamic.cache.policies.quest import Quest
from sparity.dynamic.cache.quantised_store import QuantisedStore
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.store import Holding, Store
from sparity.engine.kernels.attention import cpu
from sparity.engine.kernels.attention.cpu import Chosen, Codes, Slots

MOST_NEW = 8  # tokens of each row; of more, products of matrices are faster


def takes(query: Tensor, store: Holding) -> bool:
    """Whether the library reads a store for `query` [rows, heads, new, width]."""
    if (
        not isinstance(store, Store | QuantisedStore | MergedStore)
        or query.device.type != "cpu"
        or query.shape[2] > MOST_NEW
    ):
        return False
    if torch.is_grad_enabled() and query.requires_grad:
        return False
    plain = store if isinstance(store, Store) else store.plain if isinstance(store, MergedStore) else store.recent
    width, value_width = query.shape[-1], store.value_width
    if plain.device.type != "cpu" or plain.keys.dtype != query.dtype or cpu.declines(query.dtype, width, value_width):
        return False
    if isinstance(store, PagedStore):
        return cpu.declines(query.dtype, width, value_width, store.page) is None
    if isinstance(store, Store | MergedStore):
        return True
    return cpu.declines(query.dtype, width, value_width, store.group, store.bits, store.channels) is None


def attend_in_place(
    query: Tensor, store: Holding, sight: Sight, scaling: float, chosen: Any = None, **given: Any
) -> Tensor | None:
    """`query` [rows, heads, new, width] -> `[rows, new, heads, value_width]`, None = the library declines.

    Args:
        query: after rotary.
        store: what is held, the new tokens included.
        sight: what is seen of the text.
        scaling: of logits.
        chosen: the pages that alone are read, `Chosen`; None = all.
        given: `softcap` and `s_aux`, see `attend`.
    """
    if not takes(query, store) or not isinstance(chosen, Chosen | None):
        return None
    visible = None
    if sight.mask is not None:
        if (seen := _seen(sight)) is None:
            return None
        visible = seen.to(torch.uint8).contiguous()
    drains = given.get("s_aux")
    found = cpu.attend_slots(
        query.detach(),
        _parts(store, sight.new > 1 or not sight.everything, chosen),
        scaling,
        sight.length,
        window=sight.window or 0,
        visible=visible,
        cap=given.get("softcap") or 0.0,
        drains=None if drains is None else drains.detach().float().contiguous(),
    )
    return found.transpose(1, 2).contiguous()


def chosen_in_place(
    store: PagedStore | QuantisedStore, reader: Quest, query: Tensor, budgets: list[int], protected: tuple[int, int]
) -> Chosen | None:
    """The pages that `pages_read` finds, or None where the library does not take the store."""
    if not takes(query, store):
        return None
    levels = 0
    if isinstance(store, PagedStore):
        starts, pages = store.starts // store.page, -(-store.lengths // store.page)
        low, high = (store.mean, None) if reader.by == "mean" else (store.low, store.high)
        first = torch.full_like(pages, -(-protected[0] // store.page))
        last = pages - (store.lengths - protected[1]).clamp_min(0) // store.page if protected[1] else 0 * pages
        tokens, beside = store.lengths, torch.zeros_like(pages)
    else:
        groups = store.groups
        starts, pages, levels = groups.starts, groups.lengths, 2**store.bits - 1
        low, high = groups.buffers["zero"], groups.buffers["scale"]
        tokens, beside = store.packed.lengths, store.recent.lengths
        ends = [_ends_of(store, number, protected) for number in range(len(pages))]
        first, last = (torch.tensor(each) for each in zip(*ends, strict=True))
    budget = torch.tensor([each for each in budgets for _ in range(store.heads)])
    wanted = torch.where((budget - beside).clamp_min(0) >= tokens, pages, (budget - beside).clamp_min(0) // reader.page)
    grouped = query.detach().reshape(store.rows, store.heads, -1, query.shape[-1]).contiguous()
    wanted = wanted.clamp_min(reader.pages)
    mean = reader.group == "mean"
    return cpu.choose_pages(grouped, low, high, starts, pages, (first, last), wanted, mean=mean, levels=levels)


def pages_of(chosen: Chosen) -> list[Tensor]:
    """Chosen pages as one tensor for each head."""
    return list(chosen.pages.long().tensor_split(chosen.ends[:-1]))


def _ends_of(store: QuantisedStore, number: int, protected: tuple[int, int]) -> tuple[int, int]:
    """How many groups of a head hold one of the first or of the last tokens."""
    row, head = divmod(number, store.heads)
    ends = store.ends(row, head)
    if not len(ends):
        return 0, 0
    recent = max(protected[1] - store.always(row, head), 0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return int((starts < protected[0]).sum()), int((ends > ends[-1] - recent).sum())


def _seen(sight: Sight) -> Tensor | None:
    """bool `[rows, length]`, what all queries see of their past, or None where a mask says more than that."""
    mask = sight.mask
    if mask is None or mask.ndim == 2:
        return sight.real()
    if sight.new > 1:
        return None
    last = mask[..., : sight.length]
    if last.is_floating_point() and not bool(((last == 0) | (last <= torch.finfo(last.dtype).min / 2)).all()):
        return None
    return sight.real()


def _parts(store: Holding, placed: bool, chosen: Chosen | None) -> list[Slots]:
    """What a store holds as the library takes it; `placed`: places decide what is seen."""
    if isinstance(store, Store):
        added = store.buffers["weight"].log() if "weight" in store.buffers else None
        page = store.page if isinstance(store, PagedStore) else 1
        places = store.buffers["places"] if placed else None
        return [Slots(store.keys, store.values, store.starts, store.lengths, places, added, page, chosen)]
    if isinstance(store, MergedStore):
        keys, values, places = store.restored()
        own = store.directions
        merged = Slots(keys, values, own.starts, own.lengths, places.contiguous() if placed else None)
        return [merged, *_parts(store.plain, placed, None)]
    assert isinstance(store, QuantisedStore), "takes comes first"
    packed, groups = store.packed, store.groups
    codes = Codes(
        store.bits,
        groups.buffers["scale"],
        groups.buffers["zero"],
        packed.buffers["scale"],
        packed.buffers["zero"],
        groups.starts,
        groups.lengths,
        groups.buffers["count"],
        store.channels,
    )
    coded = Slots(
        packed.buffers["keys"],
        packed.buffers["values"],
        packed.starts,
        packed.lengths,
        packed.buffers["places"] if placed else None,
        None,
        store.group,
        chosen,
        codes,
    )
    return [coded, *_parts(store.recent, placed, None)]
