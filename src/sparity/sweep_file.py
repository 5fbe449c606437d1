"""A sweep: a base recipe over the cross product of axes, every combination a checked recipe of its own."""

import copy
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from sparity.errors import InvalidInput, suggestion, wrong_input
from sparity.measure.data.sweep_report import COLUMNS, Axis
from sparity.recipe import Recipe
from sparity.recipe_file import parse_override, read_recipe_file, set_key

MOST = 1000  # combinations
LONGEST = 80  # characters of a label or of an axis's name

Settings = dict[str, Any]  # dotted recipe key -> value


class SweepFile(BaseModel):
    """The keys of a sweep file."""

    model_config = ConfigDict(extra="forbid")

    base: str | Recipe = Field(description="a recipe, or the path of one")
    vary: dict[str, list[Any] | dict[str, Settings]] = Field(
        min_length=1,
        description="the axes: a dotted recipe key with a list of values, or a name with label -> {key: value}",
    )


@dataclass(frozen=True)
class Combination:
    """One label of every axis, and the recipe that they make of the base."""

    labels: tuple[str, ...]
    recipe: Recipe

    @property
    def words(self) -> str:
        """The labels in one line."""
        return ", ".join(self.labels)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep. `settings` holds, by axis and label, what the label sets in the base recipe."""

    base: Recipe
    axes: tuple[Axis, ...]
    settings: dict[str, dict[str, Settings]]
    combinations: tuple[Combination, ...]

    @classmethod
    @wrong_input()
    def read(
        cls,
        sweep: str | Path | Mapping[str, Any],
        overrides: list[str] | None = None,
        model: str | None = None,
    ) -> "Sweep":
        """A checked sweep from a YAML file or a dictionary.

        Args:
            sweep: the file, or its content.
            overrides: changes of the base recipe, `measure.windows=8`, or of an axis, `vary.NAME=[1, 2]`.
            model: a model in place of the base recipe's.

        Raises:
            InvalidInput: anything that is not as `docs/sweep.md` says, in one message that names the place.
        """
        where = "sweep" if isinstance(sweep, Mapping) else str(sweep)
        content = dict(sweep) if isinstance(sweep, Mapping) else read_recipe_file(sweep, "sweep")
        _check_keys(content, where)
        vary = dict(content["vary"]) if isinstance(content["vary"], Mapping) else content["vary"]
        of_base = _apply_to_axes(vary, overrides or [])
        settings, axes = _read_axes(vary, where)
        _refuse_overlap(settings, of_base, model, where)
        base = Recipe.read(content["base"], of_base, f"{where}, base")
        if model is not None:
            base = base.model_copy(update={"model": model})
        count = math.prod(len(axis.labels) for axis in axes)
        if count > MOST:
            sizes = " x ".join(str(len(axis.labels)) for axis in axes)
            raise InvalidInput(
                f"{where}, vary: {sizes} = {count:,} combinations are more than {MOST:,}: take fewer values, or "
                "several sweeps"
            )
        return cls(base, axes, settings, tuple(_combine(base, settings, where)))


def _check_keys(content: Mapping[str, Any], where: str) -> None:
    known = list(SweepFile.model_fields)
    for key in content:
        if key not in known:
            also = "; a recipe's keys go under `base`" if key in Recipe.model_fields else suggestion(str(key), known)
            raise InvalidInput(f"{where}: {key}: unknown key{also} (keys here: {', '.join(known)})")
    for key in known:
        if key not in content:
            what = SweepFile.model_fields[key].description
            raise InvalidInput(f"{where}: the key `{key}` is missing: {what}")


def _apply_to_axes(vary: Any, overrides: list[str]) -> list[str]:
    """Apply the overrides that name an axis; the others are the base recipe's."""
    of_base = []
    for override in overrides:
        if not override.startswith("vary."):
            of_base.append(override)
            continue
        path, value = parse_override(override)
        if isinstance(vary, dict):
            name = path.removeprefix("vary.")
            if name not in vary:
                raise InvalidInput(
                    f'override "{override}": no axis "{name}"{suggestion(name, map(str, vary))} '
                    f"(axes: {', '.join(map(str, vary))})"
                )
            vary[name] = value
    return of_base


def _read_axes(vary: Any, where: str) -> tuple[dict[str, dict[str, Settings]], tuple[Axis, ...]]:
    if not isinstance(vary, Mapping) or not vary:
        raise InvalidInput(
            f"{where}, vary: expected axes, each a recipe key with a list of values (stages.0.prune.sparsity: "
            f"[0.3, 0.5]) or a name with labels, got {_shown(vary)}"
        )
    settings: dict[str, dict[str, Settings]] = {}
    axes = []
    for name, given in vary.items():
        place = f"{where}, vary.{_shown(name)}"
        _check_label(name, place, "the axis's name")
        if name in COLUMNS:
            raise InvalidInput(f"{place}: the table has a column of that name: give the axis another one")
        if isinstance(given, Mapping):
            found = _labelled(given, place)
            values = list(given)
        elif isinstance(given, list | tuple):
            values = list(given)
            found = [(_label_of(value, place), {name: value}) for value in values]
        else:
            raise InvalidInput(
                f"{place}: expected a list of values, or a mapping label -> {{recipe key: value}}, got {_shown(given)}"
            )
        if not found:
            raise InvalidInput(f"{place}: no values: give at least one, or take the axis out")
        labels = [label for label, _ in found]
        twice = next((label for label, times in Counter(labels).items() if times > 1), None)
        if twice is not None:
            raise InvalidInput(f'{place}: the label "{twice}" stands twice: every label is one row of the table')
        settings[name] = dict(found)
        axes.append(Axis(name, tuple(labels), _numbers(values)))
    return settings, tuple(axes)


def _labelled(given: Mapping[Any, Any], place: str) -> list[tuple[str, Settings]]:
    found = []
    for key, sets in given.items():
        label = _label_of(key, place)
        if not isinstance(sets, Mapping):
            raise InvalidInput(
                f'{place}, label "{label}": expected {{recipe key: value}}, such as {{stages.0.prune.score: wanda}} '
                f"or {{}} for the base recipe as it is, got {_shown(sets)}"
            )
        for path in sets:
            if not isinstance(path, str) or not path:
                raise InvalidInput(f'{place}, label "{label}": {_shown(path)} is no recipe key')
        found.append((label, dict(sets)))
    return found


def _label_of(value: Any, place: str) -> str:
    if isinstance(value, str):
        label = value
    elif value is None or isinstance(value, bool):
        label = {None: "none", True: "true", False: "false"}[value]
    elif isinstance(value, int | float):
        if not math.isfinite(value):
            raise InvalidInput(f"{place}: {value} is no finite number")
        label = str(value)
    else:
        try:
            label = " ".join(yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).split())
        except (yaml.YAMLError, RecursionError) as error:
            raise InvalidInput(f"{place}: a value of type {type(value).__name__} cannot be written in YAML") from error
    _check_label(label, place, "a label")
    return label


def _check_label(label: Any, place: str, what: str) -> None:
    """Labels stand in tables, files and messages: one line of visible characters."""
    if not isinstance(label, str):
        raise InvalidInput(f"{place}: {what} is text, got {_shown(label)}")
    if not label.strip() or label != label.strip() or not label.isprintable():
        raise InvalidInput(f"{place}: {what} is one line of visible characters, got {_shown(label)}")
    if len(label) > LONGEST:
        raise InvalidInput(
            f"{place}: {what} has {len(label):,} characters, more than {LONGEST}: give a short one, as "
            "name: {label: {recipe key: value}}"
        )


def _numbers(values: list[Any]) -> tuple[float, ...] | None:
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return None
    return tuple(float(value) for value in values)


def _refuse_overlap(
    settings: dict[str, dict[str, Settings]], overrides: list[str], model: str | None, where: str
) -> None:
    """One place of the recipe belongs to one axis; else a row would not be what its labels say."""
    keys = {name: {path for sets in labels.values() for path in sets} for name, labels in settings.items()}
    for (first, ours), (second, theirs) in itertools.combinations(keys.items(), 2):
        for one, other in itertools.product(sorted(ours), sorted(theirs)):
            if _overlap(one, other):
                both = one if one == other else f"{one} and {other}, which is part of the other"
                raise InvalidInput(f"{where}, vary.{first} and vary.{second} both set {both}: leave it to one axis")
    given = [(path, f"{path}=...") for path, _ in map(parse_override, overrides)]
    if model is not None:
        given.append(("model", "--model"))
    for path, said in given:
        for name, theirs in keys.items():
            if any(_overlap(path, other) for other in theirs):
                raise InvalidInput(
                    f"{where}: {said} would be lost, vary.{name} sets it: change the axis with 'vary.{name}=...'"
                )


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _combine(base: Recipe, settings: dict[str, dict[str, Settings]], where: str) -> list[Combination]:
    found = []
    for labels in itertools.product(*settings.values()):
        words = ", ".join(labels)
        content = base.model_dump(exclude_unset=True)
        for (axis, choices), label in zip(settings.items(), labels, strict=True):
            for path, value in choices[label].items():
                set_key(content, path, copy.deepcopy(value), f'{where}, vary.{axis}, label "{label}": {path}')
        recipe = Recipe.read(content, where=f'{where}, combination "{words}"')
        if recipe.output.path is not None:
            raise InvalidInput(f"{where}: output.path: leave it out, the sweep's output is one folder for the table")
        if "speed" not in recipe.measure.model_fields_set:
            recipe = recipe.model_copy(update={"measure": recipe.measure.model_copy(update={"speed": None})})
        found.append(Combination(labels, recipe))
    return found


def _shown(value: Any) -> str:
    """A value as a message shows it: one line, not too long, without what a terminal would act on."""
    text = value if isinstance(value, str) and value.strip() and value.isprintable() else ascii(value)
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
