"""What experts do with the tokens that are routed to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparity.calibration import Visit
from sparity.errors import InvalidInput
from sparity.models import Block
from sparity.models.cuts.experts import experts_module
from sparity.models.cuts.hidden import routers
from sparity.models.experts import expert_matrices
from sparity.static.structure.subject import Subject


@dataclass
class Routed:
    """Sums over the tokens that a router sends to each expert, `[experts]` in float64.

    Attributes:
        count: how many tokens.
        gates: of their router weights.
        norms: of router weight times the norm of the expert's output.
        soft_norms: of the softmax over all experts' logits times that norm.
    """

    count: Tensor
    gates: Tensor
    norms: Tensor
    soft_norms: Tensor

    @property
    def mean_gated(self) -> Tensor:
        """The mean over its tokens of router weight times output norm; 0 for an expert without tokens."""
        return (self.norms / self.count.clamp_min(1)).float()


@contextmanager
def watched_routes(block: Block, see: Any) -> Iterator[None]:
    """Call `see(hidden, chosen, weights, logits)` for each call of a block's experts.

    `hidden` [tokens, hidden], `chosen` [tokens, k] the experts, `weights` [tokens, k], `logits` [tokens, experts].
    """
    experts, found = experts_module(block), routers(block)
    if experts is None or len(found) != 1:
        raise InvalidInput(f"{block.name} has no experts")
    logits: list[Tensor] = []

    def after_router(module: nn.Module, given: Any, output: Any) -> None:
        logits.append(output[0] if isinstance(output, tuple) else output)

    def before(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        hidden, chosen, weights = given[:3]
        see(hidden, chosen, weights, logits.pop().float())

    handles = [found[0].register_forward_hook(after_router), experts.register_forward_pre_hook(before)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expert_output(experts: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """What one expert makes of tokens `[tokens, hidden]`, in float32, without the router's weight."""
    *_, down = expert_matrices(experts, expert)
    return expert_neurons(experts, expert, hidden) @ down.float().T


def expert_neurons(experts: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """What the neurons of one expert give for tokens `[tokens, hidden]`, in float32."""
    gate, up, _ = (matrix.float() for matrix in expert_matrices(experts, expert))
    x = hidden.float()
    found: Tensor = experts.act_fn(x @ gate.T) * (x @ up.T)  # type: ignore[operator]
    return found


def routed_norms(visit: Visit) -> Routed | None:
    """The sums of one block, from a pass of its own; None for a dense block. The visit goes on as before."""
    experts = experts_module(visit.block)
    if experts is None:
        return None
    total = len(routers(visit.block)[0].get_parameter("weight"))
    sums = Routed(*(torch.zeros(total, dtype=torch.float64) for _ in range(4)))

    def see(hidden: Tensor, chosen: Tensor, weights: Tensor, logits: Tensor) -> None:
        soft = logits.softmax(-1)
        for expert in range(total):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            norm = expert_output(experts, expert, hidden[tokens]).norm(dim=-1)
            gate = weights[tokens, place].float()
            sums.count[expert] += len(tokens)
            sums.gates[expert] += float(gate.sum())
            sums.norms[expert] += float((gate * norm).sum())
            sums.soft_norms[expert] += float((soft[tokens, expert] * norm).sum())

    with torch.no_grad(), watched_routes(visit.block, see):
        visit.block.run(visit.inputs, visit.hidden)
    return sums


def each_routed(subject: Subject) -> list[Routed | None]:
    """The sums of every block; None for dense ones.

    Raises:
        InvalidInput: the model has no experts.
    """
    found = []
    for visit in subject.visits():
        found.append(routed_norms(visit))
        visit.finish()
    if all(each is None for each in found):
        raise InvalidInput(f'a model of type "{subject.config.model_type}" has no experts that could be removed')
    return found
