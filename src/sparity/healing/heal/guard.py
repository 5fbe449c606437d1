"""Whether a healing helped: text that it has not seen, KL to the dense model before and after; and putting it back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparity.errors import InvalidInput
from sparity.quality.agreement import compare

HELD_OUT = 4  # one sequence of so many judges
SHARED = 16  # neighbouring tokens that two sequences of different text hardly share


def apart(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences of `places_apart` themselves."""
    learned, held = places_apart(tokens)
    return tokens[learned], tokens[held]


def places_apart(tokens: Tensor) -> tuple[list[int], list[int]]:
    """The places of sequences to learn from and of those that judge, the last fourth, of token ids `[samples, length]`.

    Of the first those are left out that share 16 tokens in a row with one that judges, since windows may overlap.

    Raises:
        InvalidInput: nothing is left to learn from, or to judge by.
    """
    samples, length = tokens.shape
    count = max(samples // HELD_OUT, 1)
    width = min(SHARED, length)
    if samples >= 2 and length >= 2:
        held = {tuple(part) for ids in tokens[-count:] for part in ids.unfold(0, width, 1).tolist()}
        fresh = [
            number
            for number, ids in enumerate(tokens[:-count])
            if not any(tuple(part) in held for part in ids.unfold(0, width, 1).tolist())
        ]
        if fresh:
            return fresh, list(range(samples - count, samples))
    raise InvalidInput(
        "heal: some calibration sequences judge what was learned from others, and nothing is left to learn from that "
        "does not overlap them: give more samples or more text, or set `guard: off`"
    )


def divergence(dense: Any, model: Any, tokens: Tensor) -> float:
    """KL(dense || model) in nats per token on token ids `[samples, length]`."""
    return compare(dense, model, tokens.flatten(), tokens.shape[1]).kl


def snapshot(model: Any) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: parameter.data.clone() for name, parameter in model.named_parameters()}


def put_back(model: Any, was: Mapping[str, Tensor]) -> None:
    """Give a model the parameters of a snapshot."""
    for name, parameter in model.named_parameters():
        parameter.data = was[name]
