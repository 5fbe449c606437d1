"""Calls whose tokens go only so deep: later layers neither compute nor hold those that were dropped (LazyLLM)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sparity.dynamic.cache.auxiliary import HIDDEN
from sparity.dynamic.cache.checks import check_right
from sparity.dynamic.cache.layer import PolicyLayer
from sparity.dynamic.cache.prompt import Prompt
from sparity.dynamic.cache.reviving import Revival
from sparity.dynamic.cache.run import Run
from sparity.dynamic.cache.seen import Seen
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.store import Store
from sparity.errors import UnsupportedModel
from sparity.models.attached_runtime import blocks_of


@contextmanager
def narrowing(model: Any, run: Run) -> Iterator[None]:
    """Let calls drop tokens between a model's blocks, and take them up again where the policy revives them.

    That is so until the context closes; where it does not revive, only the first call of each text drops any.

    Raises:
        UnsupportedModel: the model's blocks are not found.
    """
    blocks = blocks_of(model)
    with ExitStack() as closing:
        closing.callback(setattr, run, "passing", None)
        for module in {id(each): each for each in (model, model.base_model)}.values():  # OPT calls only the first
            closing.callback(module.register_forward_pre_hook(partial(_begin, run), with_kwargs=True).remove)
            ended = module.register_forward_hook(partial(_end, run), with_kwargs=True, always_call=True)
            closing.callback(ended.remove)
        for index, block in enumerate(blocks):
            closing.callback(block.register_forward_pre_hook(partial(_narrow, run, index), with_kwargs=True).remove)
        closing.callback(blocks[-1].register_forward_hook(partial(_widen, run)).remove)
        yield


def choose(layer: PolicyLayer, query: Tensor, sight: Sight, scaling: float, softcap: float | None) -> None:
    """After a layer's attention: which tokens of the text the next layer reads, and computes where it must.

    Args:
        layer: that has read.
        query: `[rows, heads, slots, width]`, after rotary; the last slot is the last token.
        sight: of the slots.
        scaling: of logits.
        softcap: of logits.

    Raises:
        InvalidInput: padding on the right.
        UnsupportedModel: a mask that tokens which go on later would not heed.
    """
    run, passing = layer.run, layer.run.passing
    assert passing is not None, "a call is being read"
    if layer.index + 1 >= run.layers:
        return
    read = passing.read(sight)
    held = read.sum(1).tolist()
    passing.tokens = passing.tokens or held
    budgets = [run.budget(layer.index + 1, tokens) for tokens in passing.tokens]
    exceeds = any(count > budget for count, budget in zip(held, budgets, strict=True))
    if not exceeds and not any(run.auxiliaries[layer.index + 1].counts):
        return
    check_right(read)
    if run.policy.revives and not passing.narrowed:
        sight.check_causal(read)
    kept = read.clone()
    for row, budget in enumerate(budgets):
        kept[row, read[row]] = _heeded(layer, query[row, :, -1:], row, read[row], budget, (scaling, softcap))
    passing.choose(kept, read)


def _heeded(
    layer: PolicyLayer, query: Tensor, row: int, read: Tensor, budget: int, logits: tuple[float, float | None]
) -> Tensor:
    """Which of the tokens that a row has `read`, bool `[length]`, its last `query` [heads, 1, width] lets go deeper."""
    run, store = layer.run, layer.store
    assert isinstance(store, Store), "tokens are stored as they are"
    assert run.passing is not None, "a call is being read"
    keys, values = store.in_order(row, read)
    seen = Seen(query[None].detach(), keys[None], values[None], *logits, length=run.passing.tokens[row])
    first, last = run.protected(budget)
    ranks = torch.arange(keys.shape[1], device=keys.device)
    safe = ((ranks < first) | (ranks >= len(ranks) - last)).expand(seen.keys.shape[:3])
    return run.policy.select(seen, budget, safe)[0, 0].cpu()  # the same for all heads


def _begin(run: Run, module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
    """Before a call: the first of a text is narrowed, and later ones where tokens may go on."""
    given = named.get("past_key_values")
    layers = given.layers if isinstance(given, Cache) else []
    start = max((layer.get_seq_length() for layer in layers), default=0)
    run.passing, run.auxiliaries = None, [layer.auxiliary for layer in layers]
    if layers and not start:
        run.passing = Prompt()
    elif layers and run.policy.revives:
        run.passing = Revival(start)


def _end(run: Run, module: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
    """After a call, even one that failed: no layer takes tokens back from before those that are gone."""
    passing, run.passing, run.auxiliaries = run.passing, None, ()
    if passing is not None and passing.narrowed:
        for layer in named["past_key_values"].layers:
            layer.evicted_at = layer.length


def _narrow(run: Run, index: int, module: nn.Module, arguments: Any, named: dict[str, Any]) -> Any:
    """Before a block: its hidden states and all that comes with them are those of the tokens that go on."""
    passing = run.passing
    if passing is None or (passing.chosen is None and not passing.narrowed):
        return None
    given = {**dict(zip(signature(module.forward).parameters, arguments, strict=False)), **named}
    hidden = given.pop(HIDDEN, None)
    if hidden is None:
        raise UnsupportedModel(f"{type(module).__name__} names its input otherwise than {HIDDEN}: tokens cannot go")
    hidden, given = passing.enter(hidden, given, run.auxiliaries[index] if run.policy.revives else None)
    return (hidden,), given


def _widen(run: Run, module: nn.Module, arguments: Any, output: Any) -> Any:
    """After the last block: all tokens again, dropped ones with the hidden states with which they went."""
    passing = run.passing
    if passing is None or not passing.narrowed:
        return None
    if isinstance(output, Tensor):
        return passing.widened(output)
    return (passing.widened(output[0]), *output[1:])
