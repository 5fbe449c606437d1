"""The mean query and key of each head before positions turn them, found on text."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparity.dynamic.cache.learned import Call, Study
from sparity.dynamic.cache.rotary import Rotary
from sparity.dynamic.cache.run import model_rotary
from sparity.errors import UnsupportedModel


@dataclass(frozen=True)
class Centres:
    """Of one block.

    Attributes:
        queries: float32 `[texts, heads, width]`, the mean query of each text.
        keys: float32 `[texts, kv_heads, width]`, the mean key.
        spans: float32 `[texts, heads, pairs]`, the mean size of each pair of a query's numbers that turn together.
        scaling: of logits.
    """

    queries: Tensor
    keys: Tensor
    spans: Tensor
    scaling: float


def centres_of(study: Study) -> tuple[list[Centres], Rotary]:
    """Of every block the centres, by text, and how positions turn them.

    Raises:
        UnsupportedModel: positions turn nothing, or not in one way.
    """
    rotary = model_rotary(study.decoder.skeleton)
    if rotary is None:
        raise UnsupportedModel(
            f'"{study.decoder.config.model_type}" has no rotary positions: what its queries pay does not follow from '
            "their centres and the distance; take another policy"
        )
    found, seen, scaling = list[Centres](), list[tuple[Tensor, Tensor, Tensor]](), 1.0

    def see(call: Call) -> None:
        nonlocal scaling
        places = torch.arange(call.query.shape[2], device=call.query.device)
        query, key = (rotary.turn(x.float(), -places) for x in (call.query, call.key))
        spans = spans_of(query, len(rotary.frequencies)).mean(2)
        seen.append((query.mean(2), key.mean(2), spans))
        scaling = call.scaling

    for _ in study.blocks(study.texts(), see):
        queries, keys, spans = (torch.cat([each[part].cpu() for each in seen]) for part in range(3))
        found.append(Centres(queries, keys, spans, scaling))
        seen.clear()
    return found, rotary


def spans_of(x: Tensor, pairs: int) -> Tensor:
    """The size of each pair of numbers of `x` [..., width] that turn together, `[..., pairs]`."""
    return torch.hypot(x[..., :pairs], x[..., pairs : 2 * pairs])
