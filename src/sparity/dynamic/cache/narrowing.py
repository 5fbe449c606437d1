"""A prompt whose tokens go only so deep: later layers neither compute nor hold those that were dropped (LazyLLM)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sparity.dynamic.cache.checks import check_right
from sparity.dynamic.cache.layer import PolicyLayer
from sparity.dynamic.cache.prompt import Prompt
from sparity.dynamic.cache.run import Run
from sparity.dynamic.cache.seen import Seen
from sparity.dynamic.cache.sight import Sight
from sparity.errors import UnsupportedModel
from sparity.models.attached_runtime import blocks_of


@contextmanager
def narrowing(model: Any, run: Run) -> Iterator[None]:
    """Let the first call of each text drop tokens between a model's blocks, until the context closes.

    Raises:
        UnsupportedModel: the model's blocks are not found.
    """
    blocks = blocks_of(model)
    with ExitStack() as closing:
        closing.callback(setattr, run, "prompt", None)
        for module in {id(each): each for each in (model, model.base_model)}.values():  # OPT calls only the first
            closing.callback(module.register_forward_pre_hook(partial(_begin, run), with_kwargs=True).remove)
            ended = module.register_forward_hook(partial(_end, run), with_kwargs=True, always_call=True)
            closing.callback(ended.remove)
        for block in blocks:
            closing.callback(block.register_forward_pre_hook(partial(_narrow, run), with_kwargs=True).remove)
        closing.callback(blocks[-1].register_forward_hook(partial(_widen, run)).remove)
        yield


def choose(
    layer: PolicyLayer, states: tuple[Tensor, Tensor, Tensor], sight: Sight, scaling: float, softcap: float | None
) -> None:
    """After a layer's attention: which tokens of the prompt the next layer computes.

    Args:
        layer: that has read.
        states: queries `[rows, heads, slots, width]`, keys and values `[rows, kv_heads, slots, width]`.
        sight: of the slots.
        scaling: of logits.
        softcap: of logits.

    Raises:
        InvalidInput: padding on the right.
    """
    run, prompt = layer.run, layer.run.prompt
    assert prompt is not None, "a prompt is being read"
    if layer.index + 1 >= run.layers:
        return
    real, (queries, keys, values) = sight.real(), states
    held = real.sum(1).tolist()
    prompt.tokens = prompt.tokens or held
    budgets = [run.budget(layer.index + 1, tokens) for tokens in prompt.tokens]
    if all(count <= budget for count, budget in zip(held, budgets, strict=True)):
        return
    check_right(real)
    kept = real.clone()
    for row, budget in enumerate(budgets):
        own = real[row].nonzero().flatten().to(keys.device)
        seen = Seen(
            queries[row : row + 1, :, -1:].detach(),
            keys[row : row + 1, :, own].detach(),
            values[row : row + 1, :, own].detach(),
            scaling,
            softcap,
            length=prompt.tokens[row],
        )
        first, last = run.protected(budget)
        ranks = torch.arange(len(own), device=keys.device)
        safe = ((ranks < first) | (ranks >= len(own) - last)).expand(seen.keys.shape[:3])
        kept[row, real[row]] = run.policy.select(seen, budget, safe)[0, 0].cpu()  # the same for all heads
    prompt.drop(kept, real)


def _begin(run: Run, module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
    """Before a call: the first of a text is narrowed."""
    given = named.get("past_key_values")
    layers = given.layers if isinstance(given, Cache) else []
    empty = bool(layers) and not any(layer.get_seq_length() for layer in layers)
    run.prompt = Prompt() if empty else None


def _end(run: Run, module: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
    """After a call, even one that failed: no layer takes tokens back from before those that are gone."""
    prompt, run.prompt = run.prompt, None
    if prompt is None or prompt.places is None:
        return
    for layer in named["past_key_values"].layers:
        layer.evicted_at = layer.length


def _narrow(run: Run, module: nn.Module, arguments: Any, named: dict[str, Any]) -> Any:
    """Before a block: its hidden states and all that comes with them are those of the tokens that go on."""
    prompt = run.prompt
    if prompt is None or (prompt.chosen is None and prompt.places is None):
        return None
    given = {**dict(zip(signature(module.forward).parameters, arguments, strict=False)), **named}
    hidden = given.pop("hidden_states", None)
    if hidden is None:
        raise UnsupportedModel(
            f"{type(module).__name__} names its input otherwise than hidden_states: tokens cannot go"
        )
    if prompt.chosen is not None:
        hidden = prompt.narrowed(hidden)
    return (hidden,), {name: prompt.cut(name, value) for name, value in given.items()}


def _widen(run: Run, module: nn.Module, arguments: Any, output: Any) -> Any:
    """After the last block: all tokens again, dropped ones with the hidden states with which they went."""
    prompt = run.prompt
    if prompt is None or prompt.places is None:
        return None
    if isinstance(output, Tensor):
        return prompt.widened(output)
    return (prompt.widened(output[0]), *output[1:])
