"""Which pages of a store one query of each row reads."""

from typing import Any

import torch
from torch import Tensor

from sparity.dynamic.cache.coded_store import CodedStore
from sparity.dynamic.cache.in_place import chosen_in_place, takes
from sparity.dynamic.cache.pages import PagedStore
from sparity.dynamic.cache.policies.quest import Quest
from sparity.dynamic.cache.quantised_store import QuantisedStore
from sparity.dynamic.cache.run import Run
from sparity.engine.kernels.attention.cpu import Chosen

Paged = PagedStore | QuantisedStore
# int64 `[rows, kv_heads, pages]` of an even store, or one tensor for each head, or as the library takes them
Pages = Tensor | list[Tensor] | Chosen


def read_of(store: Paged, run: Run, query: Tensor, budgets: list[int], length: int, *logits: Any) -> Pages:
    """The pages of each head that a run's reader chooses, rising.

    Args:
        store: with the new tokens.
        run: whose it is.
        query: `[rows, heads, 1, width]`.
        budgets: of each row, how many tokens are read.
        length: of the text.
        logits: their scaling and their softcap.
    """
    protected = run.sinks, run.recent
    if not isinstance(store, CodedStore):
        assert isinstance(run.reader, Quest), "pages are judged by their bounds"
        return pages_read(store, run.reader, query, budgets, protected)
    slots = store.chosen(query, budgets, protected, length - 1, *logits)
    if takes(query, store):
        ends = torch.tensor([len(each) for each in slots]).cumsum(0)
        return Chosen(torch.cat(slots).to(torch.int32), ends)
    even = store.even is not None and len(set(budgets)) == 1
    return torch.stack(slots).view(store.rows, store.heads, -1) if even else slots


def pages_read(store: Paged, reader: Quest, query: Tensor, budgets: list[int], protected: tuple[int, int]) -> Pages:
    """The pages of each head, rising.

    Args:
        store: with the new tokens.
        reader: that chooses.
        query: `[rows, heads, 1, width]`.
        budgets: of each row, how many tokens are read.
        protected: how many of the first and of the last tokens are read in any case.
    """
    if (found := chosen_in_place(store, reader, query, budgets, protected)) is not None:
        return found
    grouped = query.detach().float().reshape(store.rows, store.heads, -1, query.shape[-1])
    if isinstance(store, PagedStore) and store.even is not None and len(set(budgets)) == 1:
        bounds = reader.bounds(grouped, *store.facts())
        kept = _kept(store.ends(0, 0), protected).to(bounds.device)
        chosen = reader.chosen(bounds, kept.expand(bounds.shape), budgets[0], store.even)
        return chosen.nonzero()[:, -1].view(store.rows, store.heads, -1)
    apart = []
    for row in range(store.rows):
        for head in range(store.heads):
            bounds = reader.bounds(grouped[row, head], *store.facts(row, head))
            beside = store.always(row, head)
            tokens = int(store.lengths[row * store.heads + head]) - beside
            kept = _kept(store.ends(row, head), (protected[0], max(protected[1] - beside, 0))).to(bounds.device)
            chosen = reader.chosen(bounds, kept, max(budgets[row] - beside, 0), tokens)
            apart.append(chosen.nonzero().flatten())
    return apart


def _kept(ends: Tensor, protected: tuple[int, int]) -> Tensor:
    """bool `[pages]`: those with one of the first or of the last tokens; `ends` are the slots behind each page."""
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return (starts < protected[0]) | (ends > ends[-1:] - protected[1])
