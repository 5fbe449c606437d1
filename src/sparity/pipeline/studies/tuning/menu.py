"""What can be done to a part of a model: weights given up, bits given up, inputs skipped, and combinations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparity.errors import InvalidInput, SparityError
from sparity.formats import Encoding, build_encoding
from sparity.models import Decoder
from sparity.recipe_file import read_recipe_file
from sparity.sections import Spec
from sparity.stages import BlockStage, Decision, RuntimeStage, Stage
from sparity.stages.item import StageItem
from sparity.visible import logger

log = logger(__name__)

AS_IT_IS = "dense"  # the label of the choice that changes nothing

DEFAULT = """
weights:
  dense: []
  30 %: [prune: {solver: sparsegpt, sparsity: 0.3, unseen_expert: magnitude}]
  50 %: [prune: {solver: sparsegpt, sparsity: 0.5, unseen_expert: magnitude}]
  70 %: [prune: {solver: sparsegpt, sparsity: 0.7, unseen_expert: magnitude}]
  "2:4": [prune: {solver: sparsegpt, pattern: "2:4", unseen_expert: magnitude}]
values:
  same: {encoding: same}
  int8:
    encoding: int8
    stages: [quantize: {method: nearest, bits: 8, grid: {integers: {even: true}}}]
  int4:
    encoding: {int4: {group: 32}}
    stages:
      - quantize: {method: gptq, bits: 4, group: 32, grid: {integers: {scale_type: bfloat16}}, unseen_expert: nearest}
inputs:
  all: []
  30 % skipped: [activations: {method: teal, sparsity: 0.3}]
  50 % skipped: [activations: {method: teal, sparsity: 0.5}]
  70 % skipped: [activations: {method: teal, sparsity: 0.7}]
"""

Stages = list[Annotated[Stage, StageItem]]


class Values(BaseModel):
    """An encoding of stored values, and the stages that bring weights onto its grid."""

    model_config = ConfigDict(extra="forbid")

    encoding: Spec
    stages: Stages = Field(default_factory=list)


def _every_input() -> dict[str, Stages]:
    return {"all": []}


class Menu(BaseModel):
    """Three axes, each label -> stages; the first of each changes nothing."""

    model_config = ConfigDict(extra="forbid")

    weights: dict[str, Stages] = Field(min_length=1)
    values: dict[str, Values] = Field(min_length=1)
    inputs: dict[str, Stages] = Field(default_factory=_every_input, min_length=1)

    @classmethod
    def read(cls, menu: str | Path | Mapping[str, Any] | None = None) -> "Menu":
        """From a YAML file or a dictionary; without one, the menu that is documented.

        Raises:
            InvalidInput: it is no menu; the message names the place.
        """
        if menu is None:
            content: Any = yaml.safe_load(DEFAULT)
        else:
            content = dict(menu) if isinstance(menu, Mapping) else read_recipe_file(menu, "menu")
        try:
            found = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InvalidInput(f"choices, {place}: {first['msg'].removeprefix('Value error, ')}") from error
        done = (*next(iter(found.weights.values())), *next(iter(found.inputs.values())))
        values = next(iter(found.values.values()))
        if done or values.stages or not build_encoding(values.encoding).exact:
            raise InvalidInput("choices: the first entry of weights, values and inputs must leave everything as it is")
        return found


@dataclass(frozen=True, eq=False)
class Choice:
    """One combination: a label of each axis, the stages in their order, and how the result is stored."""

    labels: tuple[str, str, str]
    axes: tuple[tuple[Stage, ...], tuple[Stage, ...], tuple[Stage, ...]]
    encoding: Encoding
    name: str

    @property
    def edits(self) -> tuple[BlockStage, ...]:
        """What changes weights."""
        return tuple(stage for axis in self.axes for stage in axis if isinstance(stage, BlockStage))

    @property
    def skips(self) -> tuple[RuntimeStage, ...]:
        """What acts while the model runs."""
        return tuple(stage for axis in self.axes for stage in axis if isinstance(stage, RuntimeStage))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All of them."""
        return tuple(stage for axis in self.axes for stage in axis)


def choices_of(menu: Menu, decoder: Decoder) -> list[Choice]:
    """Every combination that the model allows, the one that changes nothing first.

    Inputs are skipped only where no weight is given up. What cannot be done to the model is left out, with a line in
    the log.

    Raises:
        InvalidInput: nothing is left but the model as it is.
    """
    usable: dict[str, bool] = {}

    def fits(stage: Stage) -> bool:
        key = f"{stage.name} {stage.model_dump_json()}"
        if key not in usable:
            usable[key] = _fits(stage, decoder)
        return usable[key]

    found = [choice for choice in _combinations(menu) if all(map(fits, choice.stages))]
    if len(found) < 2:
        raise InvalidInput("choices: there is nothing to choose from for this model")
    return found


def _fits(stage: Stage, decoder: Decoder) -> bool:
    if not isinstance(stage, BlockStage | RuntimeStage):
        raise InvalidInput(f"choices: {stage.name} changes the whole model and cannot be one of them")
    try:
        stage.decide(decoder, None)
    except SparityError as error:
        log.warning("%s (%s) is left out of the choices: %s", stage.name, stage.words, error)
        return False
    return True


def _combinations(menu: Menu) -> Iterator[Choice]:
    whole, every = next(iter(menu.weights)), next(iter(menu.inputs))
    same = next(iter(menu.values))
    for inputs, skips in menu.inputs.items():
        for weights, edits in menu.weights.items():
            if weights != whole and inputs != every:
                continue
            for values, stored in menu.values.items():
                labels = (weights, values, inputs)
                parts = [label for label, first in zip(labels, (whole, same, every), strict=True) if label != first]
                yield Choice(
                    labels,
                    (tuple(edits), tuple(stored.stages), tuple(skips)),
                    build_encoding(stored.encoding),
                    ", ".join(parts) or AS_IT_IS,
                )


def drafts(choice: Choice, decoder: Decoder) -> dict[int, Decision]:
    """What each stage of a choice would decide for a whole model, by its place."""
    return {place: stage.decide(decoder, None) for place, stage in enumerate(choice.stages)}


def of_some(decision: Decision, names: Sequence[str]) -> Decision:
    """What a decision says of some projections."""
    wanted = set(names)
    return {
        key: {name: each for name, each in value.items() if name in wanted} if isinstance(value, dict) else value
        for key, value in decision.items()
    }
