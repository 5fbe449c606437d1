"""What of a prompt still goes on through a model, and the tensors of those tokens alone."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparity.errors import UnsupportedModel


@dataclass(eq=False)
class Prompt:
    """The first call of a text, on its way through the layers.

    Rows of unlike lengths keep unlike numbers of tokens; a row with fewer has padding in its other slots, as before.

    Attributes:
        tokens: of each row, without padding; empty before the first layer was read.
        places: of the slots in the text, int64 `[rows, slots]`, ascending; None = every token is there.
        held: bool `[rows, slots]` on the CPU, which slots are tokens and not padding.
        chosen: the slots that the next layer gets, int64 `[rows, fewer]`; None = all.
        going: which of these are tokens.
        hidden: `[rows, length, width]`, of dropped tokens the states with which they went.
    """

    tokens: list[int] = field(default_factory=list)
    places: Tensor | None = None
    held: Tensor | None = None
    chosen: Tensor | None = None
    going: Tensor | None = None
    hidden: Tensor | None = None

    def drop(self, kept: Tensor, real: Tensor) -> None:
        """Let the next layer have only the slots `kept`, of those that are `real`: bool `[rows, slots]`."""
        most, mask = int(kept.sum(1).max()), kept.clone()
        for row in range(len(kept)):
            padding = (~real[row]).nonzero().flatten()
            mask[row, padding[len(padding) - (most - int(kept[row].sum())) :]] = True
        self.chosen = mask.nonzero()[:, 1].view(len(kept), most)
        self.going = kept.gather(1, self.chosen)

    def narrowed(self, hidden: Tensor) -> Tensor:
        """`hidden` [rows, slots, width] of the chosen slots, which are the slots from now on."""
        assert self.chosen is not None, "slots were chosen"
        self.hidden = hidden if self.places is None else self.widened(hidden)
        chosen = self.chosen.to(hidden.device)
        self.places = chosen if self.places is None else self.places.gather(1, chosen)
        self.held, self.chosen = self.going, None
        return hidden.gather(1, _over(chosen, hidden))

    def widened(self, hidden: Tensor) -> Tensor:
        """`[rows, length, width]`: `hidden` [rows, slots, width] where tokens go on, and where they went."""
        assert self.places is not None, "tokens were dropped"
        assert self.hidden is not None, "tokens were dropped"
        return self.hidden.scatter(1, _over(self.places, hidden), hidden)

    def spread(self, states: Tensor) -> Tensor:
        """Keys or values `[rows, kv_heads, slots, width]` at their places in the text, 0 elsewhere; no gradients."""
        assert self.places is not None, "tokens were dropped"
        whole = states.new_zeros(*states.shape[:2], self.length, states.shape[3])
        index = self.places.to(states.device)[:, None, :, None].expand(states.shape)
        return whole.scatter(2, index, states.detach())

    def masks(self, heads: int) -> list[Tensor]:
        """Of each head of each row the places of tokens that go on, bool `[length]` on the CPU."""
        assert self.places is not None, "tokens were dropped"
        assert self.held is not None, "tokens were dropped"
        found = torch.zeros(len(self.places), self.length, dtype=torch.bool).scatter(1, self.places.cpu(), self.held)
        return [row for row in found for _ in range(heads)]

    @property
    def length(self) -> int:
        """Of the text, with padding."""
        assert self.hidden is not None, "tokens were dropped"
        return self.hidden.shape[1]

    def cut(self, name: str, given: Any) -> Any:
        """What a block is given besides hidden states, of the slots alone.

        Raises:
            UnsupportedModel: it is not known how tokens are taken out of it.
        """
        if isinstance(given, tuple | list) and given and all(isinstance(each, Tensor) for each in given):
            return tuple(self.cut(name, each) for each in given)
        if not isinstance(given, Tensor) or self.length not in given.shape:
            return given
        assert self.places is not None, "tokens were dropped"
        rows, length, places = len(self.places), self.length, self.places.to(given.device)
        by_row = given.ndim >= 2 and given.shape[0] in (1, rows)
        if by_row and given.ndim == 4 and given.shape[1:] == (1, length, length):
            every = torch.arange(rows, device=given.device)[:, None, None]
            return given.expand(rows, -1, -1, -1)[every, 0, places[:, :, None], places[:, None]][:, None]
        if by_row and given.ndim <= 3 and given.shape[1] == length:
            whole = given.expand(rows, *given.shape[1:])
            return whole.gather(1, places if given.ndim == 2 else _over(places, whole))
        raise UnsupportedModel(
            f"blocks of this model are given {name} {list(given.shape)}, out of which no tokens can be taken: take a "
            "policy that lets every layer compute all of a prompt"
        )


def _over(places: Tensor, states: Tensor) -> Tensor:
    """`places` [rows, slots] as an index of `states` [rows, any, width] along its second dimension."""
    return places[..., None].expand(*places.shape, states.shape[-1])
