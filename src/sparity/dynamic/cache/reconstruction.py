"""The largest weight that a token is paid, plain or weighed by what it does to the output (KVzip, KVzip+)."""

import torch
from torch import Tensor

from sparity.dynamic.cache.seen import AT_ONCE, Seen, cut

TINY = torch.finfo(torch.float32).tiny


def looked_at(seen: Seen, plus: bool = False) -> Tensor:
    """The largest weight of any query of any head, float32 `[batch, kv_heads, tokens]`.

    Args:
        seen: keys, and the queries that look at them.
        plus: times the size of the value after its head's part of the output projection, over the size of the query's
            hidden state (arXiv:2601.07891); `seen` has both then.
    """
    group = seen.queries.shape[1] // seen.keys.shape[1]
    most = torch.zeros(seen.keys.shape[:3], device=seen.keys.device)[:, :, None].repeat(1, 1, group, 1)
    for index, weights in enumerate(seen.blocks()):
        if plus:
            assert seen.hidden is not None, "KVzip+ is told the hidden states"
            norms = seen.hidden[:, index * AT_ONCE : index * AT_ONCE + weights.shape[-2]].float().norm(dim=-1)
            weights = weights / norms.clamp_min(TINY)[:, None, None, :, None]
        most = torch.maximum(most, weights.amax(-2))
    return (most * projected_norms(seen, group) if plus else most).amax(2)


def projected_norms(seen: Seen, group: int) -> Tensor:
    """The L2 norm of each value after each head's part of the output projection, `[batch, kv_heads, group, tokens]`."""
    assert seen.output_weight is not None, "KVzip+ is told the output projection"
    heads = cut(seen.output_weight.float(), 0, group)  # [kv_heads, group, width, hidden]
    values = seen.values.float()
    return torch.stack([(values @ heads[:, member]).norm(dim=-1) for member in range(group)], 2)
