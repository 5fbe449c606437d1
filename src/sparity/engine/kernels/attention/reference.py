"""Attention over the slots of a cache, head by head in float64; back ends differ from it by their float32 sums."""

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor, Tensor, Tensor | None]  # keys, values, places, what is added to logits: of one head


def attend_slots(
    q: Tensor,
    parts: Sequence[Sequence[Part]],
    scale: float,
    length: int,
    *,
    window: int = 0,
    visible: Tensor | None = None,
    cap: float = 0.0,
    drains: Tensor | None = None,
) -> Tensor:
    """`q` [rows, heads, fresh, width], the last tokens of a text -> `[rows, heads, fresh, value_width]`, float64.

    Args:
        q: query heads read the key and value heads in equal groups.
        parts: of each row and head in turn, `[tokens, ...]` each; softmax is over all parts together.
        scale: of products.
        length: of the text, the queries' tokens included: the last of them has the place `length - 1`.
        window: how many tokens back a query sees at most; 0 = all.
        visible: bool `[rows, length]`, places that are seen; None = all.
        cap: logits become `cap * tanh(logit / cap)`; 0 = they stay.
        drains: `[heads]`, a logit that pays for nothing; None = there is none.
    """
    rows, heads, fresh, _ = q.shape
    kv_heads = len(parts) // rows
    out = None
    for pair, own in enumerate(parts):
        row, head = divmod(pair, kv_heads)
        mine = slice(head * (heads // kv_heads), (head + 1) * (heads // kv_heads))
        keys, values, places = (torch.cat(each) for each in zip(*(part[:3] for part in own), strict=True))
        added = torch.cat([torch.zeros(len(part[2])) if part[3] is None else part[3] for part in own]).double()
        logits = q[row, mine].double() @ keys.double().T * scale  # [group, fresh, tokens]
        if cap:
            logits = cap * torch.tanh(logits / cap)
        at = torch.arange(length - fresh, length)[:, None]
        seen = (places >= 0) & (places <= at)
        if window:
            seen = seen & (places > at - window)
        if visible is not None:
            seen = seen & visible[row][places.long().clamp(0, length - 1)]
        logits = (logits + added).masked_fill(~seen, -torch.inf)
        if drains is not None:
            extra = drains[mine].double()[:, None, None].expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, extra], -1)
        weights = logits.softmax(-1)
        weights = torch.where((logits == -torch.inf).all(-1, keepdim=True), 0.0, weights)[..., : len(places)]
        found = weights @ values.double()
        out = found.new_zeros(rows, heads, *found.shape[1:]) if out is None else out
        out[row, mine] = found
    assert out is not None, "there are heads"
    return out


def choose_pages(worth: Tensor, leading: int, trailing: int, wanted: int) -> Tensor:
    """The `wanted` pages of a head, rising, by `worth` [pages]; pages at both ends first, of equal ones the later."""
    inner = range(leading, len(worth) - trailing)
    size = [float(each) if page in inner else torch.inf for page, each in enumerate(worth)]
    order = sorted(range(len(worth)), key=lambda page: (-size[page], -page))
    return torch.tensor(sorted(order[:wanted]))
