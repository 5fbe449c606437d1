"""Activations: input channels that a method finds small are skipped, token by token, while the model runs.

What a run fits is one small set of tensors per place; the weights stay. On the engine, skipped channels are not read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from sparity import registry
from sparity.budgets.base import Site
from sparity.calibration.evidence import BlockEvidence
from sparity.calibration.input_statistics.inputs import MOST_TOKENS
from sparity.dynamic.activations.fitting import Together, clock, data_bytes, fit_place
from sparity.dynamic.activations.healing import STAND_IN, attached, chosen, healed, split
from sparity.dynamic.activations.heals.base import Heal, spot_of
from sparity.dynamic.activations.methods.base import Method
from sparity.dynamic.activations.places import Place, Where, places_of
from sparity.dynamic.activations.rule_data import AGAIN
from sparity.engine.modules.skips import FIRST, SparseTokens
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Block, Decoder, InputSite
from sparity.registry import register
from sparity.sections import Number, Spec, Whole
from sparity.stages import Change, Decision, Needs, RuntimeStage
from sparity.stages.allocation import allocation_of, build_budget, files_of, with_budget
from sparity.stages.base import Estimate, ModelEvidence, Workload
from sparity.stages.joining import alike, shares_of
from sparity.stages.kinds import RuntimeFit


@register("stage", "activations")
class Activations(RuntimeStage):
    """Input channels that a method finds small are skipped, token by token."""

    method: Spec = Field("teal", description="how the channels that are skipped are chosen")
    sparsity: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.4, description="share of the work that is skipped, in [0, 1): of the weights that a token need not read"
    )
    budget: Spec = Field("uniform", description="how the sparsity is shared out among places")
    overrides: dict[str, Number] = Field(default_factory=dict, description="glob of places -> its own sparsity")
    sites: Where | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="all (inputs of all projections), hidden (inputs of the MLP's last one), gate_output (what the "
        "gate's activation gives), neurons (the MLP's, before any is computed), heads (of attention, before any is "
        "computed), [heads, neurons], or roles such as [gate, up, down]; default: the method's own",
    )
    heal: Spec | None = Field(
        None,
        description="what makes good a part of what is lost, kept where it does so on text that it did not learn on",
    )
    prompt: Literal["dense", "sparse"] = Field("dense", description="whether prompts are skipped in too")
    first: Annotated[Whole, Field(ge=0)] = Field(
        FIRST, description="tokens at the start of each sequence that stay dense"
    )

    @property
    def chosen(self) -> Method:
        """The method, built anew.

        Raises:
            InvalidInput: unknown, or with unknown options.
        """
        found: Method = registry.build("activations.method", self.method)
        return found

    @property
    def healing(self) -> Heal | None:
        """The heal, built anew, or None.

        Raises:
            InvalidInput: unknown, or with unknown options.
        """
        found: Heal | None = None if self.heal is None else registry.build("activations.heal", self.heal)
        return found

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        where = (
            "" if self.sites is None else f" at {self.sites if isinstance(self.sites, str) else ', '.join(self.sites)}"
        )
        healed = "" if self.healing is None else f", healed ({self.healing.name})"
        return f"{self.chosen.name}, {100 * self.sparsity:g} %{where if self.sites else ''}{healed}"

    @property
    def how(self) -> str:
        """See `Stage.how`."""
        return self.chosen.name

    def needs(self) -> Needs:
        """See `Stage.needs`."""
        own = Needs(statistics=self._statistics(), trials=int(self.refines))
        return with_budget(own, build_budget(self.budget))

    def reads(self) -> Mapping[str, str]:
        """The table of a budget that was measured before."""
        return files_of(build_budget(self.budget))

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """The share of every place: `{"sparsity": {place: share of its channels to skip}}`."""
        method, sites, budget, healing = self.chosen, list[Site](), build_budget(self.budget), self.healing
        for index, place in self._places_of(model):
            if place.kind not in method.takes:
                raise InvalidInput(
                    f"activations: {method.name} works at {' or '.join(method.takes)}, not at {place.kind} "
                    f"({place.name}): leave `sites` out"
                )
            if healing is not None and place.kind not in healing.takes:
                raise InvalidInput(
                    f"activations: heal {healing.name} works behind {' or '.join(healing.takes)}, not behind "
                    f"{place.kind} ({place.name}): choose another heal, or leave `heal` out"
                )
            if budget.measures and method.sees_together(place):
                raise InvalidInput(
                    f"activations: {method.name} sees {place.name} together with what comes before it, which "
                    f"budget {budget.name} cannot measure block by block: choose uniform, or a law of depth"
                )
            size = float(place.cost)
            sites.append(Site(place.name, size, index, 0.0, size * model.dtype.itemsize, clock(place), mask=False))
        return {"sparsity": allocation_of(budget, sites, evidence, self.sparsity, self.overrides)}

    @classmethod
    def joined(cls, model: Decoder, each: Mapping[str, Self]) -> Sequence[Self]:
        """See `Stage.joined`: one for each method and so on; every place's share is an override."""
        found = list[Self]()
        for options, members in alike(each):
            places = next(iter(members.values()))._places_of(model)
            shares = {place.name: members[place.name].sparsity for _, place in places if place.name in members}
            found.append(
                cls(**{**options, **shares_of(shares, {place.name: float(place.cost) for _, place in places})})
            )
        return found

    def fit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> RuntimeFit:
        """`PLACE.NAME` of the places that are chosen, NAME as the method says."""
        method, tensors, changes = self.chosen, dict[str, Tensor](), list[Change]()
        places = self._places(evidence.block.module, evidence.block.sites)
        together = self._together(evidence, places)
        for site, statistics in evidence.sites():
            for place in places:
                if place.site.name != site.name:
                    continue
                sparsity = decision["sparsity"].get(place.name, 0.0)
                found, skipped = fit_place(method, place, statistics, sparsity, together.get(place.name))
                tensors.update({f"{place.name}.{name}": tensor for name, tensor in found.items()})
                if method.stand_in is not None and sparsity > 0:
                    other, _ = fit_place(method.stand_in, place, statistics, sparsity)
                    tensors.update({f"{place.name}.{STAND_IN}{name}": tensor for name, tensor in other.items()})
                changes += self._changes(place, evidence.block.index, sparsity, skipped, weighed=True)
        ahead = [place for place in places if method.looks_ahead()]
        carried: dict[str, Tensor] = {place.kind: together[place.name].inputs[place.site.name] for place in ahead}
        return RuntimeFit(tensors, tuple(changes), carried)

    def _together(self, evidence: BlockEvidence, places: Sequence[Place]) -> dict[str, Together]:
        """By place, what the method sees at several sites, and at the block before."""
        wanted = [place for place in places if self.chosen.sees_together(place)]
        if not wanted:
            return {}
        sites = {site.name: site for place in wanted for site in (place.site, place.gives) if site is not None}
        inputs = evidence.inputs(list(sites.values()), MOST_TOKENS)
        return {place.name: Together(inputs, evidence.before.get(place.kind)) for place in wanted}

    @property
    def refines(self) -> bool:
        """See `RuntimeStage.refines`."""
        return (self.heal is not None or self.chosen.stand_in is not None) and self.sparsity > 0

    def refine(
        self, model: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor], tokens: Tensor
    ) -> Mapping[str, Tensor]:
        """See `RuntimeStage.refine`: the better of method and stand-in, with what the heal adds where that helps."""
        heal, skipping = self.healing, SparseTokens(self.first, self.prompt, self.sparsity)
        places = self._places_to_attach(model, sites)
        by_place = _by_place(places, data)
        if self.chosen.stand_in is not None:
            skips = partial(self._attached, model, places, tokens=skipping)
            by_place = chosen(skips, model, by_place, skipping, tokens)
            data = {f"{place}.{name}": tensor for place, found in by_place.items() for name, tensor in found.items()}
        if heal is None:
            return data
        with self._attached(model, places, by_place, skipping):
            found = healed(heal, model, [(place, by_place[place.name]) for place in places], skipping, tokens)
        return {**data, **found}

    @contextmanager
    def attach(self, module: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor]) -> Iterator[None]:
        """See `RuntimeStage.attach`."""
        places = self._places_to_attach(module, sites)
        tokens = SparseTokens(self.first, self.prompt, self.sparsity)
        with self._attached(module, places, _by_place(places, data), tokens):
            yield

    @contextmanager
    def _attached(
        self, module: nn.Module, places: Sequence[Place], data: Mapping[str, Mapping[str, Tensor]], tokens: SparseTokens
    ) -> Iterator[None]:
        method, heal = self.chosen, self.healing
        with ExitStack() as open_:
            for place in places:
                found = {name: tensor for name, tensor in data[place.name].items() if not name.startswith(STAND_IN)}
                own, of_heal = (found, {}) if heal is None else split(found)
                open_.enter_context(method.attach(place, own, tokens))
                if heal is not None:
                    open_.enter_context(attached(heal, place, of_heal, tokens))
            if self.sparsity > 0:
                open_.enter_context(tokens.watch(module))
            yield

    def zeroes(self, module: nn.Module, sites: Sequence[InputSite]) -> frozenset[str]:
        """See `RuntimeStage.zeroes`."""
        if self.chosen.looks_ahead():
            raise InvalidInput(f"{self.chosen.name} with `lookahead` reads another block: fit it without")
        return frozenset(place.kind for place in self._places(module, sites)) - {"input", "heads"}

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        allocation, method, changes, total = decision["sparsity"], self.chosen, list[Change](), 0
        healing = self.healing
        for index, place in self._places_of(model):
            share = allocation.get(place.name, 0.0)
            changes += self._changes(place, index, share, share, weighed=False)
            total += data_bytes(method, place, share)
            total += healing.nbytes(spot_of(place)) if healing is not None and share else 0  # at most
        return Estimate(changes=tuple(changes), runtime_bytes=total)

    def verify(self, block: Block, decision: Decision) -> list[str]:
        """Places whose recorded share is none."""
        allocation, problems = decision["sparsity"], []
        for place in self._places(block.module, block.sites):
            share = allocation.get(place.name)
            if not isinstance(share, int | float) or not 0 <= share < 1:
                problems.append(f"{place.name}: recorded to skip {share} of its channels, which is no share")
            elif self.budget == "uniform" and not self.overrides and share != self.sparsity:
                problems.append(f"{place.name}: recorded to skip {share} of its channels, not {self.sparsity:g}")
        return problems

    def _where(self) -> Where | list[str]:
        return self.chosen.where if self.sites is None else self.sites

    def _statistics(self) -> frozenset[str]:
        return frozenset({"inputs"}) if self._where() == "gate_output" else self.chosen.statistics

    def _places_of(self, model: Decoder) -> list[tuple[int, Place]]:
        """Every place of a model with the number of its block; no weights in memory."""
        blocks = range(len(model))
        return [(index, place) for index in blocks for place in self._places(model.skeleton, model.sites(index))]

    def _places(self, root: nn.Module, sites: Sequence[InputSite]) -> list[Place]:
        return places_of(root, sites, self._where())

    def _places_to_attach(self, root: nn.Module, sites: Sequence[InputSite]) -> list[Place]:
        try:
            return self._places(root, sites)
        except InvalidInput as error:
            raise CorruptFile(f"{error}; {AGAIN}") from error

    def _changes(self, place: Place, block: int, target: float, skipped: float, weighed: bool) -> Iterator[Change]:
        """One for each projection that a place saves."""
        for projection in place.saves:
            rows, columns = projection.weight.shape
            yield Change(
                stage=self.name,
                name=projection.name,
                role=projection.role,
                block=block,
                shape_before=(rows, columns),
                shape_after=(rows, columns),
                zeros=float((projection.weight == 0).sum()) / projection.weight.numel() if weighed else 0.0,
                target=target,
                skipped=skipped,
            )


def _by_place(places: Sequence[Place], data: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each place by what follows its name.

    Raises:
        CorruptFile: a place has none, or a tensor belongs to no place.
    """
    found: dict[str, dict[str, Any]] = {place.name: {} for place in places}
    for key, tensor in data.items():
        place, _, name = key.rpartition(".")
        if place not in found:
            raise CorruptFile(f"activations: the file holds the unknown {key}; {AGAIN}")
        found[place][name] = tensor
    if bare := [place for place, tensors in found.items() if not tensors]:
        raise CorruptFile(f"activations: the file lacks {bare[0]} ({len(bare)} such places); {AGAIN}")
    return found
