"""What a method is: fitted to one place's activations, it says which channels of a token count."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparity.calibration import Statistics
from sparity.dynamic.activations.places import Kind, Place, Where
from sparity.dynamic.activations.rule_data import rule_of, tensors_of
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.engine.modules.skips import InputSkip, OutputSkip, SparseTokens
from sparity.errors import InvalidInput

STAND_IN = 4  # tokens


@dataclass(frozen=True)
class Seen:
    """What is known of the activations at one place.

    Attributes:
        statistics: of the activations, those that the method needs.
        weight: `[out, in]`, what multiplies them; None = unknown.
        partner: `[tokens, in]`, float32, what the activations of `values` are multiplied with, token by token: the up
            projection's outputs beside those of a gate; None = nothing or unknown.
        sample: the activations of `values`, `[tokens, in]`; None = those of the statistics.
        neurons: `[tokens, neurons]`, float32, what the neurons of an MLP that reads `values` give; None =
            the activations are neurons themselves.
        roles: of the projections that read them, or of a gate's output the gate; none where that is not known.
        head_norms: `[tokens, heads]`, float32, the norms of what the heads of an attention that reads `values` give;
            None = there are no heads.
        before: `[tokens, in]`, float32, what the place like this one reads in the block before, token by token as
            `sample`; None = not asked for, or this is the first block.
    """

    statistics: Statistics
    weight: Tensor | None = None
    partner: Tensor | None = None
    sample: Tensor | None = None
    roles: tuple[str, ...] = ()
    neurons: Tensor | None = None
    head_norms: Tensor | None = None
    before: Tensor | None = None

    @property
    def read(self) -> Tensor:
        """What decides, float32 `[tokens, in]`: `before` where that was asked for, else `values`."""
        return self.values if self.before is None else self.before

    @property
    def values(self) -> Tensor:
        """A sample of the activations, float32 `[tokens, in]`."""
        return self.statistics["inputs"] if self.sample is None else self.sample

    @property
    def column_norms(self) -> Tensor:
        """float32 `[in]`: the norm of what each channel is multiplied by.

        Raises:
            InvalidInput: the weight is not known.
        """
        if self.weight is None:
            raise InvalidInput(f"{self.statistics.site}: the method weighs channels by the weight: give it (`weight`)")
        norms: Tensor = self.weight.float().norm(dim=0)
        return norms


class Method(ABC):
    """A way to choose the channels that are skipped; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    where: ClassVar[Where] = "all"  # where it works unless a recipe says otherwise
    takes: ClassVar[tuple[Kind, ...]] = ("input", "hidden", "gate_output")  # kinds of places that it can work at

    @property
    def statistics(self) -> frozenset[str]:
        """What it needs to know of the activations."""
        return frozenset({"inputs"})

    @property
    def stand_in(self) -> "Method | None":
        """Whose data takes the place of this method's where the model is nearer to the dense one with it."""
        return None

    def looks_ahead(self) -> bool:
        """Whether it reads what the place in the block before reads (`Seen.before`)."""
        return False

    def sees_together(self, place: Place) -> bool:
        """Whether it needs to see the same tokens at several places, so that no statistic of one of them will do."""
        return self.looks_ahead() or place.kind == "heads"

    @abstractmethod
    def fit(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        """The data by which about `sparsity` of the channels are skipped, in (0, 1)."""

    def nbytes(self, place: Place, sparsity: float) -> int:
        """The bytes of what `fit` will give for a place, whatever its activations are; no weight is read."""
        return sum(tensor.nbytes for tensor in self.fit(stand_in(place), sparsity).values())

    @abstractmethod
    def attach(self, place: Place, tensors: Mapping[str, Tensor], tokens: SparseTokens) -> AbstractContextManager[None]:
        """Skip channels at a place until the context closes.

        Raises:
            CorruptFile: the data does not fit the place.
        """

    @abstractmethod
    def mask(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """`x` [samples, tokens, in] -> bool like it, True where a channel of a token counts."""


class RuleMethod(Method):
    """A method that is one `SkipRule` per place."""

    @abstractmethod
    def rule(self, seen: Seen, sparsity: float) -> SkipRule:
        """The rule by which about `sparsity` of the channels are skipped, in (0, 1)."""

    def fit(self, seen: Seen, sparsity: float) -> dict[str, Tensor]:
        """See `Method.fit`: the tensors of the rule, see `rule_data`."""
        return tensors_of(self.rule(seen, sparsity))

    @contextmanager
    def attach(self, place: Place, tensors: Mapping[str, Tensor], tokens: SparseTokens) -> Iterator[None]:
        """See `Method.attach`."""
        rule = rule_of(tensors, place.columns, place.name)
        if rule.idle:
            yield
            return
        module = place.module
        if place.kind == "gate_output":
            handle = module.register_forward_hook(OutputSkip(rule, tokens))
        else:
            handle = module.register_forward_pre_hook(InputSkip(rule, tokens))
        try:
            yield
        finally:
            handle.remove()

    def mask(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """See `Method.mask`."""
        return rule_of(tensors, x.shape[-1], "x").like(x).keep(x)


def stand_in(place: Place) -> Seen:
    """Random activations of a place and a random weight, for what depends on nothing but their sizes."""
    values, partner = torch.randn(2, STAND_IN, place.columns, generator=torch.Generator().manual_seed(0))
    statistics = Statistics.gather(place.name, {"histogram", "inputs"})
    statistics.add(values)
    beside = partner if place.kind == "gate_output" else None
    roles = tuple(projection.role for projection in place.reads)
    return Seen(statistics, torch.ones(1, place.columns), beside, values, roles)


def nothing_skipped() -> dict[str, Tensor]:
    """The data of a place where every channel counts."""
    return tensors_of(SkipRule(torch.tensor(0.0)))
