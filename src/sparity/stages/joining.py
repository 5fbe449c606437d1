"""Stages of single projections joined into few stages for all: who says what of whom."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from sparity.stages.allocation import globs_of
from sparity.stages.base import Stage

SHARE = "sparsity"  # the option that differs between projections of one stage
Kind = TypeVar("Kind", bound=Stage)


def alike(each: Mapping[str, Kind]) -> Iterator[tuple[dict[str, Any], dict[str, Kind]]]:
    """The options but for the share, and the projections whose stages have them, in the order of the first of each."""
    found: dict[str, dict[str, Kind]] = {}
    for name, stage in each.items():
        found.setdefault(json.dumps(_options(stage), sort_keys=True), {})[name] = stage
    for members in found.values():
        yield _options(next(iter(members.values()))), members


def shares_of(each: Mapping[str, float], sizes: Mapping[str, float]) -> dict[str, Any]:
    """The options `sparsity` and `overrides` of a stage that gives each of `sizes` its share, or none at all.

    The share that most have comes first, for all; later overrides count.

    Args:
        each: name -> its share.
        sizes: every name that the stage could take -> its size, by which the mean is weighted.
    """
    shares = {name: each.get(name, 0.0) for name in sizes}
    most, _ = Counter(shares.values()).most_common(1)[0]
    overrides = {"*": most} | {
        glob: level
        for level in sorted(set(shares.values()) - {most})
        for glob in globs_of([name for name, share in shares.items() if share == level], list(sizes))
    }
    mean = sum(sizes[name] * share for name, share in shares.items()) / sum(sizes.values())
    return {SHARE: mean, "overrides": overrides}


def _options(stage: Stage) -> dict[str, Any]:
    return stage.model_dump(exclude={SHARE}, exclude_unset=True)
