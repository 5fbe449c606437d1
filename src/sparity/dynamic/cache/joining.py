"""The tokens of two neighbouring layers merged, each once (MiniCache; Liu et al. 2024, arXiv:2405.14366)."""

import torch
from torch import Tensor

from sparity.dynamic.cache.merged_store import Directions, MergedStore
from sparity.dynamic.cache.policies.minicache import MiniCache
from sparity.dynamic.cache.store import Holding, Store
from sparity.errors import UnsupportedModel

States = dict[str, tuple[Tensor, Tensor]]  # keys and values of one head's tokens in both layers, `[tokens, width]`


def open_to(store: Holding, real: Tensor, protected: tuple[int, int]) -> Tensor:
    """Which places of each text may be merged now, bool `[rows, length]`: each is judged once.

    Args:
        store: of either layer.
        real: bool `[rows, length]`, what of each text is no padding.
        protected: of the first and the last tokens of each text, how many stay as they are.
    """
    ranks, judged = real.cumsum(1) - 1, store.judged if isinstance(store, MergedStore) else 0
    last = real.sum(1, keepdim=True) - protected[1]
    return real & (ranks >= protected[0]) & (ranks < last) & (torch.arange(real.shape[1]) >= judged)


def join(
    first: Holding, second: Holding, policy: MiniCache, candidates: Tensor, recent: int
) -> tuple[Holding, Holding]:
    """Merge tokens of two layers; their stores from then on.

    Args:
        first: the earlier layer's, without padding.
        second: the later one's.
        policy: that merges.
        candidates: bool `[rows, length]`, places that may be merged; see `open_to`.
        recent: how many of the last tokens are to be judged later.

    Raises:
        UnsupportedModel: heads of the two layers differ in number or width.
    """
    one = _merging(first, None)
    other = _merging(second, one.directions)
    shapes = [[each.heads, each.plain.keys.shape[1], each.value_width] for each in (one, other)]
    if shapes[0] != shapes[1]:
        raise UnsupportedModel(
            f"minicache merges layers whose heads are alike, and of two neighbours KV heads, numbers of a key and of a "
            f"value are {shapes[0]} and {shapes[1]}: take another policy"
        )
    merged, masks = list[States](), list[Tensor]()
    shared = {"places": list[Tensor]()}
    for row in range(one.rows):
        for head in range(one.heads):
            keys, values, places = one.plain.segment(row, head)
            others = [states.to(keys.device) for states in other.plain.segment(row, head)[:2]]
            slots = candidates[row][places.long().cpu()].nonzero().flatten().to(keys.device)
            states = {"keys": (keys[slots], others[0][slots]), "values": (values[slots], others[1][slots])}
            near = ~(policy.distinct(*states["keys"]) | policy.distinct(*states["values"]))
            merged.append({name: (pair[0][near], pair[1][near]) for name, pair in states.items()})
            masks.append(torch.ones(len(places), dtype=torch.bool).index_fill(0, slots[near].cpu(), False))
            shared["places"].append(places[slots[near]])
    counts = torch.tensor([len(places) for places in shared["places"]])
    for name, dtype in (("keys", one.plain.keys.dtype), ("values", one.plain.values.dtype)):
        shared[name] = [policy.merged(*states[name]).to(dtype) for states in merged]
    one.directions.extend(counts, {name: torch.cat(each) for name, each in shared.items()})
    for layer, store in enumerate((one, other)):
        norms = {
            name: torch.cat([each[name][layer].float().norm(dim=-1) for each in merged]) for name in ("keys", "values")
        }
        store.norms.extend(counts, {name: each.to(store.plain.device) for name, each in norms.items()})
        store.plain.keep(masks)
        store.settled, store.judged = candidates.shape[1], candidates.shape[1] - recent
    return one, other


def _merging(store: Holding, directions: Directions | None) -> MergedStore:
    """A store as one whose tokens may be merged; it is one already after the first time."""
    if isinstance(store, MergedStore):
        return store
    assert isinstance(store, Store), "what is merged is stored as it is"
    return MergedStore(store, Directions(store) if directions is None else directions, directions is None)
