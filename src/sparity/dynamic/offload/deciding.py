"""What says which neurons of an MLP count for a token, and so which of its matrices may lie on disk."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from sparity.dynamic.activations.places import Place, places_of
from sparity.errors import InvalidInput
from sparity.models import InputSite, Projection

Kind = Literal["output", "gate", "predictor", "experts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WORDS = {
    "output": "the inputs of its last matrix are zero: that one's columns are on disk",
    "gate": "its gate is zero: rows of up and columns of down are on disk",
    "predictor": "a predictor names neurons: rows and columns of all its matrices are on disk",
    "experts": "a router names experts, which are on disk",
}
ADVICE = (
    "nothing in this model says which neurons count before they are read: its MLPs have no zeros. Save it with an "
    "`activations` stage whose sites are gate_output (cats, chess), hidden or neurons, or make a ReLU model of it "
    "(relufication)"
)


@dataclass(frozen=True)
class FarMlp:
    """An MLP of which some matrices lie on disk.

    Attributes:
        place: the MLP: what it reads, and its activation function.
        rows: the projections whose rows lie on disk.
        columns: the one whose columns do.
    """

    place: Place
    rows: tuple[Projection, ...]
    columns: Projection

    @property
    def units(self) -> int:
        """The neurons."""
        return self.place.columns


def kind_of(root: nn.Module, sites: Sequence[InputSite], stages: Iterable[Any]) -> Kind:
    """What decides in a model, by its run-time stages and the zeros of its activation function.

    Raises:
        InvalidInput: nothing does, or it is stored in a way that is not taken.
    """
    if any(projection.expert is not None for site in sites for projection in site.projections):
        return "experts"
    mlps = places_of(root, sites, "neurons")
    if turned := next((p for place in mlps for p in place.saves if p.transposed or p.rows is not None), None):
        raise InvalidInput(
            f"{turned.name} is stored transposed or as a part of another matrix, and its neurons cannot be put on disk "
            "one by one: choose a model with matrices of its own for gate, up and down, or for fc1 and fc2"
        )
    decided = {kind for stage in stages for kind in stage.zeroes(root, sites)}
    zeros, gated = has_zeros(mlps[0].module), len(mlps[0].reads) == 2
    if "neurons" in decided:
        return "predictor"
    if "gate_output" in decided or (zeros and gated):
        return "gate"
    if "hidden" in decided or zeros:
        return "output"
    raise InvalidInput(ADVICE)


def has_zeros(function: nn.Module) -> bool:
    """Whether an activation function gives exact zeros for what is below zero."""
    with torch.no_grad():
        return not bool(function(torch.tensor([-4.0, -1.0, -0.25])).any())


def far_mlps(root: nn.Module, sites: Sequence[InputSite], kind: Kind) -> list[FarMlp]:
    """The MLPs of a model or a block, in their order."""
    found = []
    for place in places_of(root, sites, "neurons"):
        *reads, last = place.saves
        rows = {"predictor": reads, "gate": reads[1:], "output": []}[kind]
        found.append(FarMlp(place, tuple(rows), last))
    return found


def far_experts(sites: Sequence[InputSite]) -> list[nn.Module]:
    """The modules that hold experts, each once, in their order."""
    experts = (projection for site in sites for projection in site.projections if projection.expert is not None)
    return list(dict.fromkeys(projection.module for projection in experts))
