"""The passes of a job before any work: their stages, their drafts, the models that they will open."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparity.models import Decoder
from sparity.models.ragged import is_ragged
from sparity.stages import Decision, Stage
from sparity.stages.order import passes


@dataclass(frozen=True)
class PlannedStage:
    """A stage, the model that it will find, perhaps of shapes only, and what it would decide without evidence."""

    place: int  # in the recipe, from 0
    stage: Stage
    model: Decoder = field(repr=False)
    draft: Decision = field(repr=False)


@dataclass(frozen=True)
class PlannedPass:
    """Stages that are worked through together.

    Attributes:
        number: of the pass, from 1.
        options: of the stages of this pass and of those before it, as JSON.
        last: whether its result is the run's.
        key: a hash of everything that its result rests on.
    """

    number: int
    stages: tuple[PlannedStage, ...]
    options: tuple[dict[str, Any], ...]
    last: bool
    key: str = ""

    def keyed(self, identity: Mapping[str, Any]) -> "PlannedPass":
        """The same with its key; `identity` is what it rests on besides its stages."""
        content = json.dumps({"identity": identity, "stages": self.options}, sort_keys=True)
        return replace(self, key=hashlib.sha256(content.encode()).hexdigest())

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"pass-{self.number}-{self.key[:16]}"

    @property
    def words(self) -> str:
        """Its stages in a few words."""
        return ", ".join(planned.stage.name for planned in self.stages)


def fitted(planned: PlannedPass, model: Decoder) -> PlannedPass:
    """A pass for the model that it really finds, where a stage before left blocks of different sizes."""
    if not is_ragged(model.config):
        return planned
    stages = []
    for each in planned.stages:
        draft = each.stage.decide(model, None)
        stages.append(replace(each, model=model, draft=draft))
        model = each.stage.after(model, draft)
    return replace(planned, stages=tuple(stages))


def plan_passes(stages: Sequence[Stage], model: Decoder, layer_loss: bool) -> tuple[PlannedPass, ...]:
    """The passes of a recipe for a model, without keys.

    Raises:
        InvalidInput: a stage does not fit the model that it will find.
    """
    found: list[PlannedPass] = []
    sequels = passes(stages, layer_loss)
    for number, sequel in enumerate(sequels, 1):
        planned = []
        for place, stage in enumerate(sequel.stages, sequel.first):
            draft = stage.decide(model, None)
            planned.append(PlannedStage(place, stage, model, draft))
            model = stage.after(model, draft)
        through = stages[: sequel.first + len(sequel.stages)]
        options = tuple({stage.name: stage.model_dump(mode="json")} for stage in through)
        found.append(PlannedPass(number, tuple(planned), options, last=number == len(sequels)))
    return tuple(found)
