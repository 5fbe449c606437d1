"""Choices applied to some projections of a block for a while; what they make of a weight is kept."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from sparity.calibration.evidence import BlockEvidence
from sparity.models import Block, Decoder
from sparity.pipeline.studies.tuning.menu import Choice, drafts, of_some
from sparity.stages.applied import Applied, Kept, with_sites_of
from sparity.stages.kinds import BlockStage, RuntimeStage


class AppliedChoices:
    """Applies choices by their names. `known` gives the evidence of a block of the model as it is."""

    def __init__(
        self, decoder: Decoder, choices: Mapping[str, Choice], known: Callable[[Block], BlockEvidence]
    ) -> None:
        self._decoder, self._choices, self._known = decoder, choices, known
        self._kept = Kept()
        self._drafts = {name: drafts(choice, decoder) for name, choice in choices.items()}
        self._skips = {
            name: [(stage, Applied(decoder, stage, known)) for stage in choice.skips]
            for name, choice in choices.items()
        }

    @contextmanager
    def on(self, block: Block, changed: Mapping[str, str]) -> Iterator[None]:
        """See `trials.Applies`: `changed` is projection -> the name of a choice."""
        here = [projection for projection in block.projections if changed.get(projection.name)]
        before = {projection.name: projection.weight.clone() for projection in here}
        by_choice: dict[str, list[str]] = {}
        for projection in here:
            by_choice.setdefault(changed[projection.name], []).append(projection.name)
        try:
            for name, projections in by_choice.items():
                self._edit(block, name, projections)
            with ExitStack() as open_:
                for name, projections in by_choice.items():
                    for stage, applied in self._skips[name]:
                        open_.enter_context(applied.on(block, self._shares(name, stage, projections)))
                yield
        finally:
            for projection in here:
                projection.write(before[projection.name])

    def weights(self, block: Block, name: str, projections: Sequence[str]) -> dict[str, Tensor]:
        """What a choice makes of the weights `[out, in]` of some projections; the block is left as it was."""
        with self.on(block, dict.fromkeys(projections, name)):
            return {each.name: each.weight.clone() for each in block.projections if each.name in projections}

    def skipped(self, name: str, projection: str) -> float:
        """The share of a projection's input channels that a choice skips."""
        shares = [self._shares(name, stage, [projection]).get(projection, 0.0) for stage, _ in self._skips[name]]
        return max(shares, default=0.0)

    def _shares(self, name: str, stage: RuntimeStage, projections: Sequence[str]) -> dict[str, float]:
        place = self._choices[name].stages.index(stage)
        shares: dict[str, float] = of_some(self._drafts[name][place], projections)["sparsity"]
        return shares

    def _edit(self, block: Block, name: str, names: Sequence[str]) -> None:
        """Edit the block's weights; what stages had made of them before is not made again."""
        choice = self._choices[name]
        stages = [(place, stage) for place, stage in enumerate(choice.stages) if isinstance(stage, BlockStage)]
        keys = [tuple(_key(stage) for _, stage in stages[: count + 1]) for count in range(len(stages))]
        start = next((n for n in range(len(stages), 0, -1) if self._all_kept(names, keys[n - 1])), 0)
        projections = {projection.name: projection for projection in block.projections if projection.name in names}
        if start:
            for each, projection in projections.items():
                found = self._kept.get((each, keys[start - 1]))
                assert found is not None, "it was there"
                projection.write(found["weight"])
        for (place, stage), key in list(zip(stages, keys, strict=True))[start:]:
            decision = of_some(self._drafts[name][place], names)
            stage.edit(self._decoder, self._known(with_sites_of(block, names)), decision)
            for each, projection in projections.items():
                self._kept.keep((each, key), {"weight": projection.weight.clone()})

    def _all_kept(self, names: Sequence[str], key: tuple[str, ...]) -> bool:
        return all(self._kept.get((name, key)) is not None for name in names)


def _key(stage: BlockStage) -> str:
    return json.dumps([stage.name, stage.model_dump(mode="json")], sort_keys=True)
