"""A prompt read a second time, for policies whose scores are found then; the cache forgets that reading (KVzip)."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from sparity.dynamic.cache.checks import check_right
from sparity.dynamic.cache.layer import PolicyLayer
from sparity.dynamic.cache.policies.base import highest
from sparity.dynamic.cache.policies.kvzip import KVzip
from sparity.dynamic.cache.quantised_store import QuantisedStore
from sparity.dynamic.cache.reconstruction import TINY, looked_at
from sparity.dynamic.cache.run import Run, output_weight_of
from sparity.dynamic.cache.seen import Seen
from sparity.errors import InvalidInput


@dataclass(frozen=True)
class Reading:
    """One chunk of a text of `length` tokens, as it is read again behind it.

    Attributes:
        policy: that scores.
        first: place of the chunk's first token.
        last: place behind its last.
        length: of the text, before the reading.
        real: bool `[rows, length + new]`, what of text and reading is no padding.
    """

    policy: KVzip
    first: int
    last: int
    length: int
    real: Tensor

    def see(self, layer: PolicyLayer, module: nn.Module, query: Tensor, scaling: float, softcap: float | None) -> None:
        """Score the chunk's tokens by the queries of the reading, `query` [rows, heads, new, width]."""
        layer.waiting = False
        store, plus = layer.store, self.policy.plus
        assert store is not None, "attention follows an update"
        hidden = layer.run.hidden_of(layer.index, query)
        group = query.shape[1] // store.heads
        weight = output_weight_of(module, query.shape[1]) if plus else None
        for row, real in enumerate(self.real):
            ranks, fresh, found = real.cumsum(0) - 1, real[self.length :].to(query.device), []
            for head in range(store.heads):
                keys, values, places = store.segment(row, head)
                places = places.long().cpu()
                chunk = real[places] & (places >= self.first) & (places < self.last)
                sinks = real[places] & (ranks[places] < self.policy.sinks) & (places < self.first)
                slots = (chunk | sinks | (real[places] & (places >= self.length))).nonzero().flatten()
                mass, own = store.mass_of(row, head), slice(head * group, head * group + group)
                assert mass is not None, "scores are held with the tokens"
                found.append(mass.clone())
                if not bool(chunk.any()):
                    continue
                seen = Seen(
                    query[row, own][None][:, :, fresh],
                    keys[slots.to(keys.device)][None, None],
                    values[slots.to(values.device)][None, None],
                    scaling,
                    softcap,
                    output_weight=None if weight is None else weight[own],
                    hidden=None if hidden is None else hidden[row][None][:, fresh],
                )
                scores = looked_at(seen, plus)[0, 0][chunk[slots].to(keys.device)]
                found[-1][chunk.to(keys.device)] = scores.clamp_min(TINY)  # 0 is a token that was never scored
            store.set_mass(row, found)


def read_again(run: Run, module: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
    """After a call: a prompt that has more tokens than may stay is read again, and what is looked at least goes."""
    real, run.pending = run.pending, None
    if real is None:
        return
    check_right(real)
    called = {**signature(module.forward).bind_partial(*arguments).arguments, **named}
    past, policy = called["past_key_values"], run.policy
    assert isinstance(policy, KVzip), "only KVzip reads again"
    name = "inputs_embeds" if called.get("input_ids") is None else "input_ids"
    text: Tensor = called[name]
    layers = [layer for layer in past.layers if isinstance(layer, PolicyLayer)]
    new, length = text.shape[1], layers[0].length
    request = torch.tensor(policy.request, dtype=torch.int64, device=text.device).expand(len(text), -1)
    if name == "inputs_embeds":
        request = module.get_input_embeddings()(request) if policy.request else text[:, :0]
    check_positions(module, length + len(policy.request) + policy.lead + min(policy.chunk, new))
    for start in range(0, new, policy.chunk):
        end, lead, own = min(start + policy.chunk, new), max(start - policy.lead, 0), real[:, length - new :]
        asked = torch.ones(len(text), len(policy.request), dtype=torch.bool)
        mask = torch.cat([real, asked, own[:, lead:end]], 1)
        first = length - new + start
        run.reading = Reading(policy, first, first + end - start, length, mask)
        try:
            with _others_kept(past), torch.no_grad():
                _read(module, name, torch.cat([request, text[:, lead:end]], 1), mask, length, past)
        finally:
            run.reading = None
            for layer in layers:
                layer.crop(min(length - layer.length, 0))
    _evict(layers, run, policy, real)


def check_positions(module: Any, length: int) -> None:
    """Refuse texts that a model with learned positions cannot read a second time; raises `InvalidInput`."""
    config = module.config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None)
    if most and length > most and not any(name.endswith("rotary_emb") for name, _ in module.named_modules()):
        raise InvalidInput(
            f"kvzip reads a prompt a second time, behind itself, up to position {length}, and the model has {most}: "
            "shorten the prompt, or lower `chunk`"
        )


def _read(module: nn.Module, kind: str, text: Tensor, mask: Tensor, length: int, past: Any) -> None:
    named: dict[str, Any] = {kind: text, "past_key_values": past, "use_cache": True}
    if not bool(mask.all()):
        named["attention_mask"] = mask.long().to(text.device)
        if "position_ids" in signature(module.forward).parameters:
            named["position_ids"] = (named["attention_mask"].cumsum(1) - 1).clamp_min(0)[:, length:]
    if "logits_to_keep" in signature(module.forward).parameters:
        named["logits_to_keep"] = 1
    module(**named)


@contextmanager
def _others_kept(past: Any) -> Iterator[None]:
    """Layers without a policy, which take no tokens back, are what they were afterwards; copies read meanwhile."""
    kept = {index: layer for index, layer in enumerate(past.layers) if not isinstance(layer, PolicyLayer)}
    try:
        for index, layer in kept.items():
            past.layers[index] = copy.deepcopy(layer)
        yield
    finally:
        for index, layer in kept.items():
            past.layers[index] = layer


def _evict(layers: Sequence[PolicyLayer], run: Run, policy: KVzip, real: Tensor) -> None:
    """Keep of the heads of all layers together, or of each layer, what scores highest."""
    masks: list[list[Tensor]] = [[] for _ in layers]
    for row, text in enumerate(real):
        tokens, ranks = int(text.sum()), text.cumsum(0) - 1
        orders, budgets = list[list[Tensor]](), list[int]()
        for layer in layers:
            store = layer.store
            assert store is not None, "a prompt was read"
            budget = run.budget(layer.index, tokens)
            first, last = run.protected(budget)
            orders.append([])
            for head in range(store.heads):
                places, mass = store.segment(row, head)[2].long().cpu(), store.mass_of(row, head)
                assert mass is not None, "scores are held with the tokens"
                safe = (ranks[places] < first) | (ranks[places] >= tokens - last)
                scores = mass.cpu().masked_fill((mass.cpu() == 0) | safe, torch.inf)
                orders[-1].append(scores.masked_fill(~text[places], -torch.inf))
            budgets.append(budget * store.heads)
        for mask, kept in zip(masks, _chosen(orders, budgets, policy.across == "model"), strict=True):
            mask += kept
    for layer, kept in zip(layers, masks, strict=True):
        layer.keep(kept)
        if isinstance(layer.store, QuantisedStore):
            layer.store.quantise(layer.store.due(layer.length), layer.length)


def _chosen(orders: Sequence[Sequence[Tensor]], budgets: Sequence[int], together: bool) -> list[list[Tensor]]:
    """The highest of each layer's heads, or of all layers' together, bool like `orders` [layers][heads][slots]."""
    joined = [torch.cat(list(order)) for order in orders]
    if together:
        flat = torch.cat(joined)
        kept = list(torch.split(highest(flat, sum(budgets)) & (flat > -torch.inf), [len(each) for each in joined]))
    else:
        pairs = zip(joined, budgets, strict=True)
        kept = [highest(each, budget) & (each > -torch.inf) for each, budget in pairs]
    sizes = [[len(head) for head in order] for order in orders]
    return [list(torch.split(each, size)) for each, size in zip(kept, sizes, strict=True)]
