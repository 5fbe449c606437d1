"""Heals fitted on some of the calibration sequences, and kept where they bring the others nearer to the dense model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from sparity.dynamic.activations.divergence import divergence
from sparity.dynamic.activations.heals.base import PREFIX, Correction, Heal, Spot, corrected, spot_of
from sparity.dynamic.activations.method_data import checked, skips_nothing
from sparity.dynamic.activations.places import Place
from sparity.engine.modules.skips import SparseTokens
from sparity.errors import InvalidInput
from sparity.visible import logger

log = logger(__name__)
HELD_OUT = 4  # one sequence of so many judges
STAND_IN = "stand_in_"  # before the names of the data that a method's stand-in would have


def chosen(
    skips: Callable[[Mapping[str, Mapping[str, Tensor]]], AbstractContextManager[None]],
    model: Any,
    data: Mapping[str, Mapping[str, Tensor]],
    skipping: SparseTokens,
    tokens: Tensor,
) -> dict[str, dict[str, Tensor]]:
    """The method's data of every place, or its stand-in's: what brings some sequences nearer to the dense model.

    Args:
        skips: lets the model skip by the data of every place.
        model: a transformers causal language model.
        data: of every place, with what `STAND_IN` marks.
        skipping: what says which tokens are sparse.
        tokens: token ids `[samples, length]`; the last fourth of the sequences judges.
    """
    own = {place: {n: t for n, t in found.items() if not n.startswith(STAND_IN)} for place, found in data.items()}
    other = {
        place: {n.removeprefix(STAND_IN): t for n, t in found.items() if n.startswith(STAND_IN)} or own[place]
        for place, found in data.items()
    }
    held, losses = tokens[-max(len(tokens) // HELD_OUT, 1) :], list[float]()
    for version in (own, other):
        with skips(version):
            losses.append(_loss(model, skipping, held))
    log.info(
        "KL to the dense model on %d sequences %.5f, with the stand-in %.5f: %s",
        len(held), *losses, "kept" if losses[0] < losses[1] else "the stand-in is taken",
    )  # fmt: skip
    return own if losses[0] < losses[1] else other


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A place's own data, and its heal's without the prefix."""
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    return own, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name not in own}


@contextmanager
def attached(heal: Heal, place: Place, tensors: Mapping[str, Tensor], skipping: SparseTokens) -> Iterator[None]:
    """Correct what a place misses until the context closes; nothing is done without data.

    Raises:
        CorruptFile: the data does not fit the place.
    """
    spot = spot_of(place)
    if not tensors:
        yield
        return
    checked(tensors, heal.layout(spot), f"{place.name}.{heal.name}")
    with corrected(spot.module, Correction(heal, tensors, skipping)):
        yield


def healed(
    heal: Heal,
    model: Any,
    places: Sequence[tuple[Place, Mapping[str, Tensor]]],
    skipping: SparseTokens,
    tokens: Tensor,
) -> dict[str, Tensor]:
    """`PLACE.NAME` of what a heal adds, for a model that skips activations; nothing where that does not help.

    The last fourth of the sequences judges, by KL(dense || sparse) with the heal and without it.

    Args:
        heal: what to fit.
        model: a transformers causal language model whose activations are skipped; it is not changed.
        places: with their data.
        skipping: what says which of its tokens are sparse.
        tokens: token ids `[samples, length]`.

    Raises:
        InvalidInput: fewer than two sequences, or of fewer than two tokens.
    """
    if len(tokens) < 2 or tokens.shape[1] < 2:
        raise InvalidInput(
            f"heal {heal.name} learns on some sequences and is judged on others: give 2 or more of 2 tokens or more, "
            f"not {list(tokens.shape)}"
        )
    spots = [spot_of(place) for place, data in places if not skips_nothing(data)]
    if not spots:
        return {}
    count = max(len(tokens) // HELD_OUT, 1)
    learned, held = tokens[:-count], tokens[-count:]
    found = heal.fit(model, spots, skipping, learned)
    losses = [_loss(model, skipping, held), _loss_with(heal, model, spots, found, skipping, held)]
    better = losses[1] < losses[0]
    log.info(
        "heal %s: KL to the dense model on %d held-out sequences %.5f, without it %.5f: %s",
        heal.name, count, losses[1], losses[0], "kept" if better else "left out",
    )  # fmt: skip
    if not better:
        return {}
    return {
        f"{spot.place.name}.{PREFIX}{name}": tensor.cpu().contiguous()
        for spot, tensors in zip(spots, found, strict=True)
        for name, tensor in tensors.items()
    }


def _loss_with(
    heal: Heal,
    model: Any,
    spots: Sequence[Spot],
    found: Sequence[Mapping[str, Tensor]],
    skipping: SparseTokens,
    tokens: Tensor,
) -> float:
    with ExitStack() as hooks:
        for spot, tensors in zip(spots, found, strict=True):
            hooks.enter_context(corrected(spot.module, Correction(heal, tensors, skipping)))
        return _loss(model, skipping, tokens)


def _loss(model: Any, skipping: SparseTokens, tokens: Tensor) -> float:
    with torch.no_grad():
        return sum(float(divergence(model, skipping, ids[None])) for ids in tokens) / len(tokens)
