"""Drafts: tokens that a model is asked to check, each as if it came alone.

transformers checks the tokens that an assistant or prompt lookup made in one call: for `drafted` tokens it asks for the
logits of one more (`logits_to_keep`), and the first call has the prompt in front of them. `mark` tells the model below
the head how many there are; `parts` and `cut` divide such a call where single steps would round otherwise.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

MARK = "drafted"
MOST_DRAFTED = 127  # a draft and the token before it; logits of more are those of a text that is scored


def mark(model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A hook in front of a causal language model: how many of its new tokens are a draft, for the model below."""
    kept = named.get("logits_to_keep")
    if torch.compiler.is_compiling() or type(kept) is not int or not 1 < kept <= MOST_DRAFTED + 1:
        return None
    checks = getattr(model.base_model, "checks_drafts", None)  # another model may have been put in its place
    return (arguments, {**named, MARK: kept - 1}) if checks is not None and checks() else None


def watch(model: nn.Module) -> None:
    """Put `mark` in front of a model, once."""
    if mark not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(mark, with_kwargs=True)


def unwatch(model: nn.Module) -> None:
    """Take `mark` away again."""
    for number, hook in list(model._forward_pre_hooks.items()):
        if hook is mark:
            del model._forward_pre_hooks[number], model._forward_pre_hooks_with_kwargs[number]


def parts(fresh: int, drafted: int, length: int, most: int, by_length: bool) -> list[int]:
    """The sizes of the calls that give `fresh` tokens, of which the last `drafted` are a draft, the bits of steps.

    Args:
        fresh: new tokens of each row.
        drafted: how many of them are a draft, fewer than `fresh`.
        length: tokens in the cache.
        most: tokens of each row that the fast path takes at a time.
        by_length: whether the rotary frequencies of a prompt depend on its length.
    """
    if fresh <= most and (length or not by_length):
        return [fresh]  # on the fast path all tokens are like single steps
    prompt = fresh - drafted
    if length and prompt == 1:  # the token that a step would take: it may come with the others
        prompt = 0
    rest = fresh - prompt
    sizes = [most] * (rest // most) + [rest % most]
    return [size for size in (prompt, *sizes) if size]


def cut(named: dict[str, Any], sizes: Sequence[int], length: int) -> list[dict[str, Any]]:
    """The calls for one part of the new tokens after the other, or none where inputs have shapes that are not known.

    Args:
        named: the arguments of the call for all of them; it is not changed.
        sizes: how many tokens each part has.
        length: tokens in the cache.
    """
    fresh = sum(sizes)
    sides = {"input_ids": fresh, "inputs_embeds": fresh, "position_ids": fresh, "attention_mask": length + fresh}
    given = {name: named[name] for name in sides if named.get(name) is not None}
    if any(not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != sides[name] for name, x in given.items()):
        return []
    ends = list(accumulate(sizes))
    return [
        named
        | {
            name: x[:, : length + end] if name == "attention_mask" else x[:, end - size : end]
            for name, x in given.items()
        }
        for size, end in zip(sizes, ends, strict=True)
    ]
