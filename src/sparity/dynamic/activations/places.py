"""Where a model's activations are skipped, and the work that each place saves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput, suggestion
from sparity.models import InputSite, Projection
from sparity.models.activation_functions import ACTIVATIONS
from sparity.models.block import in_features

# every projection's input; the inputs of the MLP's last one; the gate's output; the MLP's neurons or the heads of
# attention, before any of them is computed
Where = Literal["all", "hidden", "gate_output", "neurons", "heads"]
Kind = Literal["input", "hidden", "gate_output", "neurons", "heads"]
HIDDEN = ("down", "fc2")


@dataclass(frozen=True)
class Place:
    """A module whose inputs, or outputs, are activations that can be skipped.

    Attributes:
        name: of the (first) projection that it is named after.
        kind: `input` of a projection, `hidden` when that is the last of an MLP, `gate_output`: what the gate's
            activation function gives, `neurons`: what that, or the one of an MLP without a gate, will give, `heads`:
            what the query heads of attention will give.
        site: where the activations, or (gate, neurons, heads) the inputs of the MLP or of attention, are seen.
        reads: the projections that the module holds; of a gate the gate itself; of neurons the gate and up, or fc1; of
            heads q, or the matrix that holds it.
        saves: the projections of which a skipped channel need not be read; of heads q and o, since later tokens need
            the keys and values of all.
        module: what is hooked; of neurons the activation function, of heads what holds o.
        heads: how many there are, of heads.
        gives: of heads where their outputs are seen, the input of o.
        before: the place like it in the block before, in a whole model; None for the first block.
    """

    name: str
    kind: Kind
    site: InputSite
    reads: tuple[Projection, ...]
    saves: tuple[Projection, ...]
    module: nn.Module
    heads: int = 0
    gives: InputSite | None = None
    before: "Place | None" = field(default=None, repr=False, compare=False)

    @property
    def columns(self) -> int:
        """The channels."""
        return in_features(self.saves[-1].module)

    @property
    def cost(self) -> int:
        """The weights that a channel of the place stands for, over all channels."""
        return sum(projection.weight.numel() for projection in self.saves)

    @property
    def weight(self) -> Tensor:
        """`[out, in]`: what the activations are multiplied by; of a gate's, the columns of down."""
        if self.kind in ("gate_output", "neurons", "heads"):
            return self.saves[-1].weight
        weights = [projection.weight for projection in self.reads]
        return weights[0] if len(weights) == 1 else torch.cat(weights)


def places_of(root: nn.Module, sites: Sequence[InputSite], chosen: Where | Sequence[str]) -> list[Place]:
    """The places in a model or a block, in the order of computation.

    Args:
        root: what holds the sites' modules.
        sites: input sites.
        chosen: one of `Where`, roles of projections such as [gate, up, down], or [heads, neurons].

    Raises:
        InvalidInput: fused experts, roles that no projection has, part of a fused matrix, or no gate.
    """
    every = [projection for site in sites for projection in site.projections]
    if expert := next((projection for projection in every if projection.expert is not None), None):
        raise InvalidInput(
            f"activations: {expert.name} is one of several experts in one module, whose inputs cannot be skipped yet: "
            "leave the stage out for this model; thresholds for experts come later"
        )
    if chosen == "gate_output":
        return list(_gates(root, sites))
    named = [chosen] if isinstance(chosen, str) else list(chosen)
    if predicted := [each for each in named if each in PREDICTED]:
        if others := [each for each in named if each not in PREDICTED]:
            raise InvalidInput(
                f"activations.sites: {predicted[0]} and {others[0]} are chosen in different ways: put them into two "
                "stages"
            )
        found = [place for kind in dict.fromkeys(predicted) for place in PREDICTED[kind](root, sites)]
        order = {site.name: number for number, site in enumerate(sites)}
        return sorted(found, key=lambda place: order[place.site.name])
    roles = _roles(every, chosen)
    places = []
    for site in sites:
        for module in dict.fromkeys(projection.module for projection in site.projections):
            held = tuple(projection for projection in site.projections if projection.module is module)
            wanted = [projection for projection in held if projection.role in roles]
            if wanted and len(wanted) < len(held):
                raise InvalidInput(
                    f"activations.sites: {', '.join(p.role for p in held)} are one matrix in this model "
                    f"({wanted[0].name} is a part of it) and have one input: name all of them or none"
                )
            if wanted:
                kind: Kind = "hidden" if held[0].role in HIDDEN else "input"
                places.append(Place(held[0].name, kind, site, held, held, module))
    return places


def _roles(every: Sequence[Projection], chosen: str | Sequence[str]) -> set[str]:
    known = list(dict.fromkeys(projection.role for projection in every))
    if chosen == "all":
        return set(known)
    if chosen == "hidden":
        found = {role for role in known if role in HIDDEN}
        if not found:
            raise InvalidInput(
                f"activations.sites: hidden is the input of an MLP's last projection ({' or '.join(HIDDEN)}), which "
                f"this model does not have (roles: {', '.join(known)})"
            )
        return found
    named = [chosen] if isinstance(chosen, str) else chosen
    for role in named:
        if role not in known:
            close = suggestion(role, known)
            raise InvalidInput(
                f'activations.sites: no projection has the role "{role}"{close} (roles: {", ".join(known)}; or all, '
                "hidden, gate_output, neurons, heads)"
            )
    return set(named)


def _gates(root: nn.Module, sites: Sequence[InputSite]) -> Iterator[Place]:
    """The output of the activation function of every gated MLP."""
    down = next((p for site in sites for p in site.projections if p.role == "down"), None)
    if down is None or not any(p.role == "gate" for site in sites for p in site.projections):
        raise InvalidInput("activations.sites: gate_output needs an MLP with a gate, which this model does not have")
    for seen, (gate, *_), saves, function in _layers(root, sites):
        if len(saves) == 3:
            yield Place(gate.name, "gate_output", seen, (gate,), saves[1:], function)


def _neurons(root: nn.Module, sites: Sequence[InputSite]) -> Iterator[Place]:
    """The neurons of every MLP, seen from its input."""
    found = [Place(reads[0].name, "neurons", seen, reads, saves, fn) for seen, reads, saves, fn in _layers(root, sites)]
    if not found:
        raise InvalidInput("activations.sites: neurons needs an MLP of gate, up and down or of fc1 and fc2")
    yield from _linked(found)


def _heads(root: nn.Module, sites: Sequence[InputSite]) -> Iterator[Place]:
    """The query heads of every attention, seen from its input."""
    parents = {child: parent for parent in root.modules() for child in parent.children()}
    found, waiting = list[Place](), None
    for site in sites:
        by_role = {projection.role: projection for projection in site.projections}
        if first := by_role.get("q", by_role.get("qkv")):
            waiting = site, first
        elif "o" in by_role and waiting is not None:
            (seen, first), o = waiting, by_role["o"]
            config: Any = getattr(parents.get(o.module), "config", None)
            heads = int(getattr(config, "num_attention_heads", 0))
            if not heads or in_features(o.module) % heads:
                raise InvalidInput(f"activations.sites: it is not known how many heads {o.name} reads")
            saves = (first, o) if first.role == "q" else (o,)
            found.append(Place(saves[0].name, "heads", seen, (first,), saves, o.module, heads, site))
            waiting = None
    if not found:
        raise InvalidInput("activations.sites: heads needs attention with projections q (or qkv) and o")
    yield from _linked(found)


def _linked(places: Sequence[Place]) -> Iterator[Place]:
    """Each with the one in the block before."""
    before: Place | None = None
    for place in places:
        before = replace(place, before=before)
        yield before


PREDICTED = {"neurons": _neurons, "heads": _heads}  # named before any of them is computed


def _layers(
    root: nn.Module, sites: Sequence[InputSite]
) -> Iterator[tuple[InputSite, tuple[Projection, ...], tuple[Projection, ...], nn.Module]]:
    """Of every MLP its input, the projections that read it, these and the last one, and the activation function."""
    parents = {child: parent for parent in root.modules() for child in parent.children()}
    waiting: tuple[InputSite, tuple[Projection, ...]] | None = None
    for site in sites:
        by_role = {projection.role: projection for projection in site.projections}
        if "gate" in by_role and "up" in by_role:
            waiting = site, (by_role["gate"], by_role["up"])
        elif "fc1" in by_role:
            waiting = site, (by_role["fc1"],)
        elif waiting is not None and (last := next((by_role[role] for role in HIDDEN if role in by_role), None)):
            seen, reads = waiting
            parent = parents.get(reads[0].module)
            function = next((getattr(parent, name) for name in ACTIVATIONS if hasattr(parent, name)), None)
            if not isinstance(function, nn.Module):
                raise InvalidInput(
                    f"activations.sites: the function that is applied to {reads[0].name} is no module of this model"
                )
            yield seen, reads, (*reads, last), function
            waiting = None
