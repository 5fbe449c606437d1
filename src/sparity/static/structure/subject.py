"""A model and text, as a method of structured pruning sees them: one walk over its blocks, or what it makes of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from sparity.calibration import Visit, walk
from sparity.errors import InvalidInput
from sparity.models import Block, Decoder, InputSite
from sparity.models.dimensions import KV_GROUPS, QUERY_HEADS, Dimension
from sparity.models.families.base import Family

See = Callable[[InputSite, Tensor], None]


@dataclass(frozen=True)
class Subject:
    """A causal language model in memory, which no method changes, and token ids `[samples, length]`."""

    model: nn.Module
    given: Tensor | None

    @cached_property
    def decoder(self) -> Decoder:
        """The model as a list of blocks."""
        return Decoder.open(self.model, device=next(self.model.parameters()).device)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.decoder.config

    @property
    def family(self) -> Family:
        """The model's family."""
        return self.decoder.family

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.decoder)

    @property
    def tokens(self) -> Tensor:
        """The token ids; raises `InvalidInput` without any."""
        if self.given is None:
            raise InvalidInput("the method reads text: give token ids [samples, length]")
        return self.given

    def visits(self) -> Iterator[Visit]:
        """Every block of the model with its inputs, in order, one sequence per forward pass."""
        return walk(self.decoder, self.decoder.inputs(self.tokens, 1))

    def blocks(self) -> Iterator[Block]:
        """Every block with its weights, without text."""
        for index in range(self.depth):
            with self.decoder.block(index) as block:
                yield block

    def dimensions(self, block: Block) -> tuple[Dimension, ...]:
        """What can be cut out of a block, with query heads that share key-value heads as a dimension of their own."""
        found = self.family.dimensions(block.module, block.name, self.config)
        heads = self.family.query_heads(block.module, block.name, self.config)
        return found if heads is None else (*found, heads)

    def heads(self, block: Block) -> Dimension:
        """The heads that can be cut out of a block with their keys and values.

        Raises:
            InvalidInput: there are none that could.
        """
        for found in self.family.dimensions(block.module, block.name, self.config):
            if found.name in (KV_GROUPS, QUERY_HEADS):
                return found
        raise InvalidInput(f"{block.name} has no attention heads that could be cut")


def run_watched(visit: Visit, roles: Sequence[str], see: See) -> None:
    """Run a block and show the inputs `[tokens, in]` of every site with a projection of one of the roles.

    `see` is called once for every sequence; for an expert with the tokens that are routed to it, which may be none.
    """
    with ExitStack() as watching:
        for site in visit.block.sites:
            if any(projection.role in roles for projection in site.projections):
                watching.enter_context(site.watch(partial(see, site)))
        visit.finish()


def check_tokens(token_ids: Any) -> Tensor | None:
    """Token ids `[samples, length]` as int64 on the CPU; None for none.

    Raises:
        InvalidInput: something else.
    """
    if token_ids is None:
        return None
    try:
        tokens = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"token ids must be whole numbers [samples, length]: {error}") from error
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool or not tokens.numel():
        raise InvalidInput(
            f"token ids must be whole numbers [samples, length], got {tokens.dtype} {list(tokens.shape)}"
        )
    return tokens.to("cpu", torch.int64)
