"""A choice at every unit as an ordinary recipe."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparity.models import Decoder
from sparity.pipeline.studies.tuning.costs import Goal, Prices
from sparity.pipeline.studies.tuning.menu import AS_IT_IS, Choice
from sparity.pipeline.studies.tuning.units import Unit
from sparity.stages import Stage
from sparity.stages.allocation import globs_of

PREFER = {"bytes": "memory", "tokens/s": "speed", "prefill": "speed"}


def recipe_of(
    base: Mapping[str, Any],
    decoder: Decoder,
    units: Sequence[Unit],
    picks: Mapping[str, Choice],
    prices: Prices,
    goal: Goal,
) -> dict[str, Any]:
    """The recipe that does to every unit what its choice says.

    Args:
        base: the sections of the recipe other than its stages and its output.
        decoder: the model.
        units: of it.
        picks: unit -> its choice; at least one changes something.
        prices: with the format of every unit's choice.
        goal: what they are formats for.
    """
    joined = _joined(decoder, units, picks)
    stages = [{stage.name: stage.model_dump(mode="json", exclude_unset=True)} for stage in joined]
    stored: dict[tuple[str, str], list[str]] = {}
    encodings: dict[str, Any] = {}
    matrices = [name.removesuffix(".weight") for name in decoder.linear_weights()]
    for unit in units:
        choice, price = picks[unit.name], prices[unit.name, picks[unit.name].name]
        if choice.name != AS_IT_IS:
            encodings[choice.labels[1]] = choice.encoding.spec
            stored.setdefault((price.format, choice.labels[1]), []).extend(_matrices(unit, matrices))
    said = {
        glob: {"format": form, "values": copy.deepcopy(encodings[label])}
        for (form, label), names in stored.items()
        for glob in globs_of(names, matrices)
    }
    output = {"format": "packed", "prefer": PREFER[goal], "matrices": said}
    return {**base, "stages": stages, "output": output}


def _joined(decoder: Decoder, units: Sequence[Unit], picks: Mapping[str, Choice]) -> Iterator[Stage]:
    """What is done to weights first, then to their values, then to inputs; the same stage of several units once."""
    for axis in range(len(next(iter(picks.values())).axes)):
        for place in range(max(len(choice.axes[axis]) for choice in picks.values())):
            by_kind: dict[type[Stage], dict[str, Stage]] = {}
            for unit in units:
                stages = picks[unit.name].axes[axis]
                if place < len(stages):
                    own = by_kind.setdefault(type(stages[place]), {})
                    own.update(dict.fromkeys(unit.projections, stages[place]))
            for kind, each in by_kind.items():
                yield from kind.joined(decoder, each)


def _matrices(unit: Unit, stored: Sequence[str]) -> list[str]:
    """The stored matrices that hold a unit's projections: of their names, or what these are parts of."""
    found = []
    for name in unit.projections:
        found += [matrix for matrix in stored if name == matrix or name.startswith(f"{matrix}.")]
    return list(dict.fromkeys(found))
