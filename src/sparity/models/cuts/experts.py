"""Take whole experts out of a block, with their rows of the router."""

from typing import Any

from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models.block import Block, set_parameter
from sparity.models.cuts.hidden import routers
from sparity.models.experts import DOWN, GATE_UP

COUNTS = ("num_local_experts", "num_experts")  # what configurations call their number


def experts_module(block: Block) -> nn.Module | None:
    """The module that holds a block's experts, or None for a dense block."""
    return next((projection.module for projection in block.projections if projection.expert is not None), None)


def top_k(config: Any) -> int:
    """How many experts a token visits."""
    return int(config.num_experts_per_tok)


def check_experts(config: Any, kept: Tensor, where: str) -> None:
    """Raise `InvalidInput` when fewer experts would be left than a token visits."""
    if len(kept) < top_k(config):
        raise InvalidInput(
            f"{where}, experts: {len(kept)} would be left, but every token visits {top_k(config)}: keep more"
        )


def cut_experts(block: Block, kept: Tensor, config: Any) -> dict[str, Any]:
    """Keep only some experts of a block, in place; the configuration's attributes that change.

    Raises:
        InvalidInput: the block has no experts, or fewer would stay than a token visits.
    """
    experts, choosers = experts_module(block), routers(block)
    if experts is None or len(choosers) != 1:
        raise InvalidInput(f"{block.name} has no experts that could be cut")
    check_experts(config, kept, block.name)
    for name in (GATE_UP, DOWN):
        set_parameter(experts, name, experts.get_parameter(name).data[kept.to(experts.get_parameter(name).device)])
    (router,) = choosers
    total = len(router.get_parameter("weight"))
    for name, parameter in list(router._parameters.items()):
        if parameter is not None and parameter.shape[:1] == (total,):
            set_parameter(router, name, parameter.data[kept.to(parameter.device)])
    for name, buffer in list(router._buffers.items()):
        if buffer is not None and buffer.shape[:1] == (total,):
            router._buffers[name] = buffer[kept.to(buffer.device)]
    for module in block.module.modules():
        if isinstance(module.__dict__.get("num_experts"), int):
            module.num_experts = len(kept)  # type: ignore[assignment]
    return {name: len(kept) for name in COUNTS if hasattr(config, name)}
