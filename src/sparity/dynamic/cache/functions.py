"""Policies on tensors: `select_cache` and `score_cache`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparity import registry
from sparity.dynamic.cache.checks import check_heads, check_states
from sparity.dynamic.cache.learned import WORDS, Sizes, misfit
from sparity.dynamic.cache.policies.base import Policy
from sparity.dynamic.cache.seen import Seen
from sparity.errors import InvalidInput, wrong_input

KIND = "cache.policy"


@wrong_input()
def select_cache(queries: Tensor, keys: Tensor, values: Tensor, *, policy: str, keep: float, **options: Any) -> Tensor:
    """Which tokens of one layer's cache a policy keeps.

    Args:
        queries: `[batch, heads, new, width]`, after rotary, of the last `new` tokens (usually of all).
        keys: `[batch, kv_heads, tokens, width]`, after rotary.
        values: `[batch, kv_heads, tokens, width]`.
        policy: of `sparity methods cache.policy`.
        keep: the share of the tokens that stay, in (0, 1], or their number from 2 on.
        options: the policy's, and `sinks` and `recent` (tokens at the start and at the end that stay, and that `keep`
            counts; the policy's own by default), `scaling` (of logits; default `width ** -0.5`), `softcap`, and
            `output_weight` (`[heads, value_width, hidden]`, for policies that weigh values by what they do) and
            `hidden` (`[batch, new, hidden]`, what the projection of keys read), and what a policy learns of a model
            beforehand (`sparity.calibrate_cache`): `retrieval`, `gate`, `centres`, `spans`.

    Returns:
        bool `[batch, kv_heads, tokens]`, True where a token stays. Query heads that share keys choose once.

    Raises:
        InvalidInput: an unknown policy or option, shapes that do not fit, fewer tokens than are protected.
        NumericalError: NaN or infinite numbers.

    Example:
        >>> import sparity, torch
        >>> keys = torch.tensor([3.0, 1.0, 2.0, 5.0]).view(1, 1, 4, 1)
        >>> sparity.select_cache(keys, keys, keys, policy="knorm", keep=0.5)
        tensor([[[False,  True,  True, False]]])
    """
    built, first, last, seen = _read(queries, keys, values, policy, options)
    if isinstance(keep, bool) or not isinstance(keep, int | float) or keep <= 0 or (keep > 1 and int(keep) != keep):
        raise InvalidInput(f"keep {keep!r} must be a share in (0, 1] or a whole number of tokens from 2 on")
    budget = built.budget(seen.tokens, keep)
    own = built.protected(budget)
    first, last = own[0] if first is None else first, own[1] if last is None else last
    if built.counts and budget < min(first + last, seen.tokens):
        raise InvalidInput(
            f"{built.name} keeps {budget} of {seen.tokens} tokens, fewer than the {first} first and {last} last that "
            f"always stay: raise `keep`, or lower the policy's window, `sinks` or `recent`"
        )
    return built.select(seen, budget, protected_of(keys, first, last))


@wrong_input()
def score_cache(queries: Tensor, keys: Tensor, values: Tensor, *, policy: str, **options: Any) -> Tensor:
    """The scores by which a policy keeps tokens of one layer's cache.

    Args:
        queries: and all others, see `select_cache`.
        keys: see there.
        values: see there.
        policy: of `sparity methods cache.policy`.
        options: see there.

    Returns:
        float32 `[batch, kv_heads, tokens]`, finite, higher is kept. Tokens that the policy always keeps, such as those
        of an observation window, have the highest score of their head.

    Raises:
        InvalidInput: see `select_cache`.
        NumericalError: NaN or infinite numbers.

    Example:
        >>> import sparity, torch
        >>> keys = torch.tensor([3.0, 1.0, 2.0, 5.0]).view(1, 1, 4, 1)
        >>> sparity.score_cache(keys, keys, keys, policy="knorm")
        tensor([[[-3., -1., -2., -5.]]])
    """
    built, _, _, seen = _read(queries, keys, values, policy, options)
    return built.score(seen)


def protected_of(keys: Tensor, first: int, last: int) -> Tensor:
    """bool `[batch, kv_heads, tokens]`, True for the first and the last tokens."""
    places = torch.arange(keys.shape[2], device=keys.device)
    return ((places < first) | (places >= keys.shape[2] - last)).expand(keys.shape[:3])


def policy_of(spec: str | Mapping[str, Any]) -> Policy:
    """A policy from its name or `{name: options}`; names are read without regard to case, hyphens and underscores."""
    known = {_plain(each): each for each in registry.names(KIND)}
    if isinstance(spec, str):
        spec = {spec: {}}
    if isinstance(spec, Mapping):
        spec = {known.get(_plain(str(name)), name): options for name, options in spec.items()}
    built: Policy = registry.build(KIND, spec)
    check(built)
    return built


def check(policy: Policy) -> None:
    """Refuse options that make no sense.

    Raises:
        InvalidInput: a number that must be positive is not, or a share lies outside [0, 1].
    """
    least = {
        "window": 1,
        "kernel": 1,
        "sinks": 0,
        "recent": 0,
        "lag": 2,
        "page": 1,
        "pages": 1,
        "future": 1,
        "beta": 1,
        "tokens": 8,
        "repeats": 2,
        "chunk": 1,
        "lead": 0,
        "length": 2,
        "furthest": 1,
        "ridge": 1e-9,
        "parts": 1,
        "iterations": 0,
        "dense": 0,
    }
    least |= {"group": 1, "residual": 0} if policy.stores else {}
    for option, lowest in least.items():
        value: Any = getattr(policy, option, None)
        if value is not None and value < lowest:
            raise InvalidInput(f'policy "{policy.name}", option "{option}": {value} must be {lowest} or more')
    if policy.stores and vars(policy)["bits"] not in (2, 4, 8):
        raise InvalidInput(f'policy "{policy.name}", option "bits": {vars(policy)["bits"]} must be 2, 4 or 8')
    if not 1 <= getattr(policy, "bits", 1) <= 8:
        raise InvalidInput(f'policy "{policy.name}", option "bits": {vars(policy)["bits"]} must lie in [1, 8]')
    if getattr(policy, "kernel", 1) % 2 == 0:
        raise InvalidInput(f'policy "{policy.name}", option "kernel": {vars(policy)["kernel"]} must be odd')
    depths = list(getattr(policy, "at", (0.5,)))
    if not depths or depths != sorted(set(depths)) or not all(0 <= share <= 1 for share in depths):
        raise InvalidInput(
            f'policy "{policy.name}", option "at": {depths} must be one or more shares in [0, 1], in ascending order'
        )
    for option in ("floor", "first", "echo", "induction", "heads", "interpolation", "retain", "start"):
        value = getattr(policy, option, 0)
        if not 0 <= value <= 1:
            raise InvalidInput(f'policy "{policy.name}", option "{option}": {value} must lie in [0, 1]')


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _read(
    queries: Tensor, keys: Tensor, values: Tensor, policy: str, options: Mapping[str, Any]
) -> tuple[Policy, int | None, int | None, Seen]:
    """The policy, the numbers of protected tokens that were given, and the layer."""
    check_states(queries=queries, keys=keys, values=values)
    check_heads(queries, keys)
    if keys.shape[:3] != values.shape[:3]:
        raise InvalidInput(f"keys {list(keys.shape)} and values {list(values.shape)} must have the same tokens")
    if not isinstance(policy, str):
        raise InvalidInput(f"policy must be a name (`sparity methods cache.policy`), not {type(policy).__name__}")
    name = policy_of(policy).name
    own = {field.name for field in dataclasses.fields(registry.get(KIND, name))}
    common = {
        key: options[key]
        for key in ("sinks", "recent", "scaling", "softcap", "output_weight", "hidden", *WORDS)
        if key in options and key not in own
    }
    built = policy_of({name: {key: value for key, value in options.items() if key not in common}})
    for key in ("sinks", "recent"):
        given: Any = common.get(key, 0)
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise InvalidInput(f"{key} {given!r} must be a whole number, 0 or more")
    weight, scaling = common.get("output_weight"), common.get("scaling")
    wanted = (queries.shape[1], values.shape[-1])
    if weight is not None and (not isinstance(weight, Tensor) or weight.ndim != 3 or weight.shape[:2] != wanted):
        raise InvalidInput(f"output_weight must be [heads, value_width, hidden] = [{wanted[0]}, {wanted[1]}, hidden]")
    hidden, learned = common.get("hidden"), {key: common[key] for key in WORDS if common.get(key) is not None}
    read = (queries.shape[0], queries.shape[2])
    if hidden is not None and (not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != read):
        raise InvalidInput(f"hidden must be [batch, new, hidden] = [{read[0]}, {read[1]}, hidden]")
    if missing := built.learns - {*learned} - {"retrieval"}:
        first = min(missing)
        raise InvalidInput(f"{built.name} needs {first}: {WORDS[first]}, as sparity.calibrate_cache finds it")
    if "hidden" in built.told and hidden is None:
        raise InvalidInput(f"{built.name} reads hidden states: give hidden=[batch, new, hidden], with the queries")
    sizes = Sizes(queries.shape[1], keys.shape[1], keys.shape[-1], 0 if hidden is None else hidden.shape[-1])
    for key, tensor in learned.items():
        if wrong := misfit(key, tensor, sizes):
            raise InvalidInput(f"{key} must be {WORDS[key]}; it is {wrong}")
    seen = Seen(
        queries.detach(),
        keys.detach(),
        values.detach(),
        queries.shape[-1] ** -0.5 if scaling is None else float(scaling),
        common.get("softcap"),
        output_weight=weight,
        learned=learned,
        hidden=hidden,
    )
    return built, common.get("sinks"), common.get("recent"), seen
