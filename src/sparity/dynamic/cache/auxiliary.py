"""Tokens that went only as deep as to one layer, and what it takes to compute them there later: LazyLLM's Aux Cache."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparity.dynamic.cache.slots import Slots
from sparity.errors import UnsupportedModel

HIDDEN = "hidden_states"  # the name of blocks' input, and of its buffer here


class Auxiliary:
    """The tokens that stopped before a layer, with what its block is to be given of each."""

    def __init__(self) -> None:
        self.slots: Slots | None = None

    @property
    def nbytes(self) -> int:
        """Of all buffers, with the room in them."""
        return 0 if self.slots is None else self.slots.nbytes

    @property
    def counts(self) -> list[int]:
        """How many tokens of each row lie here; empty = none ever did."""
        return [] if self.slots is None else self.slots.lengths.tolist()

    def select_rows(self, rows: Tensor) -> None:
        """Hold copies of some rows, in their order; one may come several times."""
        if self.slots is not None:
            self.slots.select_rows(rows)

    def stop(self, places: Tensor, stopping: Tensor, states: Mapping[str, Tensor]) -> None:
        """Take tokens in.

        Args:
            places: in the text, int64 `[rows, slots]`.
            stopping: bool `[rows, slots]` on the CPU, those that stop here.
            states: of all slots what the block would be given, name -> `[rows, slots, ...]`.

        Raises:
            UnsupportedModel: other names than before.
        """
        if self.slots is None:
            buffers = {name: each.new_empty(0, *each.shape[2:]) for name, each in states.items()}
            buffers["places"] = torch.empty(0, dtype=torch.int64, device=states[HIDDEN].device)
            self.slots = Slots(len(places), 1, buffers)
        if odd := {*states, "places"} ^ {*self.slots.buffers}:
            raise UnsupportedModel(
                f"blocks are given {min(odd)} of some tokens of a text only: take a policy that revives none"
            )
        given = {name: each.detach()[stopping.to(each.device)] for name, each in states.items()}
        given["places"] = places.to(self.slots.device)[stopping.to(self.slots.device)]
        self.slots.extend(stopping.sum(1), given)

    def wake(self, wanted: Tensor) -> list[dict[str, Tensor]]:
        """Give back of each row the tokens at places that are `wanted`, bool `[rows, length]` on the CPU.

        Returns:
            Name -> `[tokens, ...]`, `places` among them. Nothing where no token ever stopped.
        """
        slots = self.slots
        if slots is None:
            return [{} for _ in wanted]
        found, masks = [], []
        for row, own in enumerate(wanted):
            cut = slots.cut(row, 0)
            mask = own[slots.buffers["places"][cut].cpu()]
            index = (cut.start + mask.nonzero().flatten()).to(slots.device)
            found.append({name: buffer[index] for name, buffer in slots.buffers.items()})
            masks.append(~mask)
        if not all(bool(mask.all()) for mask in masks):
            slots.keep(masks)
        return found
