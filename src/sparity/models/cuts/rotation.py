"""Turn a model's residual stream without changing what it computes: norms folded away, weights turned."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.models.block import Block, Projection
from sparity.models.cuts.hidden import block_norms, declines_hidden, outside_blocks, routers
from sparity.models.dimensions import WRITE_HIDDEN
from sparity.models.families.base import Family


def fold_norms(model: nn.Module, family: Family, blocks: Sequence[Block]) -> None:
    """Move the weights of all norms into what reads them, in place; the head gets a matrix of its own.

    Raises:
        InvalidInput: norms that are no plain RMSNorm, or that lie behind a sum's part, where no rotation commutes.
    """
    config: Any = model.config
    reason = declines_hidden(model, family, list(blocks))
    if reason:
        raise InvalidInput(f"the residual stream of this model cannot be turned: {reason}")
    untie(model)
    for block in blocks:
        norms = block_norms(block, int(config.hidden_size))
        readers = (
            [p for p in block.projections if p.role in ("q", "k", "v", "qkv")],
            [p for p in block.projections if p.role in ("gate", "up", "fc1")],
        )
        if len(norms) != 2:
            raise InvalidInput(f"{block.name} has {len(norms)} norms of the stream, where two are known how to fold")
        for norm, read in zip(norms, readers, strict=True):
            weight = norm.get_parameter("weight").data
            for projection in read:
                projection.write(projection.weight.float() * weight.float())
            if any(p.role in ("gate", "up") for p in read):
                for router in routers(block):
                    router.get_parameter("weight").data.mul_(weight)
            weight.fill_(1)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for module in outside_blocks(model, family):
        if not isinstance(module, nn.Embedding | nn.Linear):
            head.weight.data.copy_(head.weight.float() * module.weight.float())
            module.get_parameter("weight").data.fill_(1)


def untie(model: nn.Module) -> None:
    """Give the head a matrix of its own."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    new: Any = copy.deepcopy(model.config)
    new.tie_word_embeddings = False
    for module in model.modules():
        if module.__dict__.get("config") is model.config and module is not model:
            module.config = new
    model.config = new


def turned(projection: Projection, rotation: Tensor) -> Tensor:
    """A weight for a stream that is turned, `x Q` in place of x: reads or writes, by the projection's role."""
    weight = projection.weight.double()
    return (rotation.T @ weight if projection.role in WRITE_HIDDEN else weight @ rotation).float()


def turned_bias(projection: Projection, rotation: Tensor) -> Tensor | None:
    """The bias of a projection that writes into the turned stream; None without one."""
    bias = getattr(projection.module, "bias", None)
    if bias is None or projection.role not in WRITE_HIDDEN:
        return None
    turned_one: Tensor = (bias.detach().double() @ rotation).float()
    return turned_one


def rotate(model: nn.Module, family: Family, blocks: Sequence[Block], rotation: Tensor) -> None:
    """Turn the stream of a model whose norms are folded by one orthogonal matrix `[hidden, hidden]`, in place."""
    for block in blocks:
        for projection in block.projections:
            bias = turned_bias(projection, rotation)
            projection.write(turned(projection, rotation))
            if bias is not None:
                projection.module.bias.data.copy_(bias)  # type: ignore[operator]
        for router in routers(block):
            weight = router.get_parameter("weight").data
            weight.copy_(weight.double() @ rotation)
    for module in outside_blocks(model, family):
        if isinstance(module, nn.Embedding | nn.Linear):
            module.weight.data.copy_(module.weight.double() @ rotation)
