"""Which stages may follow which, and which share one walk over the model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sparity.errors import InvalidInput
from sparity.stages.base import Needs, Property, Stage
from sparity.stages.kinds import BlockStage, ModelStage, ShapeStage

LOSES: dict[Property, str] = {
    "mask": "its zeros",
    "shapes": "the shapes that it counts on",
    "values": "the weights that it was fitted to",
    "tokens": "what it keeps in the cache",
    "prompts": "the blocks of attention that it chose",
    "experts": "the experts that it chose",
}
WHOLE = (ModelStage, ShapeStage)  # work on the whole model, in a pass of their own


def check_order(stages: Sequence[Stage]) -> None:
    """Refuse an order in which a stage loses what an earlier one relies on.

    Raises:
        InvalidInput: it names both stages and what would be lost, or could not be compared.
    """
    for later, stage in enumerate(stages):
        for earlier, before in enumerate(stages[:later]):
            if before.rewrites and stage.compares:
                raise InvalidInput(
                    f"stages.{later} ({stage.name}: {stage.how}) holds every matrix against the dense model's, and "
                    f"stages.{earlier} ({before.name}) has rewritten or added to them: take a method that compares "
                    f"predictions, such as distillation, or leave {before.name} out"
                )
            lost = [LOSES[kind] for kind in sorted(before.relies_on - stage.preserves)]
            if lost:
                raise InvalidInput(
                    f"stages.{later} ({stage.name}) comes after stages.{earlier} ({before.name}), which would lose "
                    f"{' and '.join(lost)}: put {stage.name} before {before.name}, or leave one of them out"
                )


@dataclass(frozen=True)
class Sequel:
    """Stages that share one walk and one commit per block, or a single stage that trains the whole model.

    Attributes:
        first: the place of the first of them in the recipe, from 0.
    """

    first: int
    stages: tuple[Stage, ...]


def needs_of(stage: Stage, layer_loss: bool) -> Needs:
    """What a stage reads, with what it takes to measure the loss of every projection that it edits."""
    needs = stage.needs()
    if layer_loss and isinstance(stage, BlockStage):
        return replace(needs, statistics=needs.statistics | {"gram"})
    return needs


def passes(stages: Iterable[Stage], layer_loss: bool = False) -> list[Sequel]:
    """The stages in their order, cut where one needs the model as a pass opens it, edits the rest, or trains."""
    found: list[Sequel] = []
    for place, stage in enumerate(stages):
        if found and _joins(found[-1], stage, layer_loss):
            found[-1] = Sequel(found[-1].first, (*found[-1].stages, stage))
        else:
            found.append(Sequel(place, (stage,)))
    return found


def _joins(sequel: Sequel, stage: Stage, layer_loss: bool) -> bool:
    needs, first = needs_of(stage, layer_loss), sequel.stages[0]
    if isinstance(stage, WHOLE) or isinstance(first, WHOLE) or needs.opened_model:
        return False
    if any(isinstance(each, BlockStage) and each.edits_rest for each in (first, stage)):
        return False
    opening = needs_of(
        first, layer_loss
    )  # outputs of unedited blocks are carried on: nothing else can be gathered on the way
    return not (needs.statistics and opening.order == "independent" and opening.statistics)
