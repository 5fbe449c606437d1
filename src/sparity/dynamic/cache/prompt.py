"""What of a prompt still goes on through a model, and the tensors of those tokens alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparity.dynamic.cache.auxiliary import HIDDEN, Auxiliary
from sparity.dynamic.cache.sight import Sight
from sparity.errors import UnsupportedModel

MASK = "attention_mask"  # what blocks call the one thing of theirs that is of pairs of tokens


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
        stopping: bool `[rows, slots]` on the CPU, tokens among the slots that the next layer does not get.
        hidden: `[rows, length, width]`, of dropped tokens the states with which they went.
    """

    tokens: list[int] = field(default_factory=list)
    places: Tensor | None = None
    held: Tensor | None = None
    chosen: Tensor | None = None
    going: Tensor | None = None
    stopping: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def narrowed(self) -> bool:
        """Whether the present layer is without some tokens."""
        return self.places is not None

    @property
    def length(self) -> int:
        """Of the text, with padding."""
        assert self.hidden is not None, "tokens were dropped"
        return self.hidden.shape[1]

    def read(self, sight: Sight) -> Tensor:
        """The places that the present layer reads, bool `[rows, length]` on the CPU; `sight` is of a whole text."""
        if self.places is None:
            return sight.real()
        assert self.held is not None, "tokens were dropped"
        return torch.zeros(len(self.places), self.length, dtype=torch.bool).scatter(1, self.places.cpu(), self.held)

    def choose(self, kept: Tensor, read: Tensor) -> None:
        """Let the next layer have only the places `kept`, of those that this one has `read`: bool `[rows, length]`."""
        if self.places is not None:
            kept, read = kept.gather(1, self.places.cpu()), read.gather(1, self.places.cpu())
        most, mask = int(kept.sum(1).max()), kept.clone()
        for row in range(len(kept)):
            padding = (~read[row]).nonzero().flatten()
            mask[row, padding[len(padding) - (most - int(kept[row].sum())) :]] = True
        self.chosen, self.stopping = mask.nonzero()[:, 1].view(len(kept), most), read & ~kept
        self.going = kept.gather(1, self.chosen)

    def enter(self, hidden: Tensor, given: Mapping[str, Any], auxiliary: Auxiliary | None) -> tuple[Tensor, Any]:
        """What the next block gets: its `hidden` states [rows, slots, width], and all else that it was to be `given`.

        Args:
            hidden: what the last block gave.
            given: by name, of the whole prompt.
            auxiliary: what keeps tokens that stop here; None = they are gone for good.
        """
        if self.chosen is not None:
            if auxiliary is not None:
                self._stop(hidden, given, auxiliary)
            hidden = self._narrow(hidden)
        return hidden, {name: self.cut(name, value) for name, value in given.items()}

    def _stop(self, hidden: Tensor, given: Mapping[str, Any], auxiliary: Auxiliary) -> None:
        assert self.stopping is not None, "slots were chosen"
        rows, slots = hidden.shape[:2]
        places = torch.arange(slots).expand(rows, -1) if self.places is None else self.places
        mine = given if self.places is None else {name: self.cut(name, value) for name, value in given.items()}
        states = {name: each.expand(rows, *each.shape[1:]) for name, each in tokenwise(mine, slots).items()}
        auxiliary.stop(places, self.stopping, {HIDDEN: hidden, **states})

    def _narrow(self, hidden: Tensor) -> Tensor:
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
        raise unknown(name, given)


def tokenwise(given: Mapping[str, Any], tokens: int) -> dict[str, Tensor]:
    """What a block is given of each of its `tokens` besides hidden states, name -> `[rows or 1, tokens, ...]`.

    A part of a tuple has its number behind the name.
    """
    return {
        f"{name}.{number}": part
        for name, value in given.items()
        if name != MASK
        for number, part in enumerate(value if isinstance(value, tuple | list) else (value,))
        if isinstance(part, Tensor) and part.ndim in (2, 3) and part.shape[1] == tokens
    }


def unknown(name: str, given: Tensor) -> UnsupportedModel:
    """The error where a block is given what is not understood."""
    return UnsupportedModel(
        f"blocks of this model are given {name} {list(given.shape)}, out of which no tokens can be taken: take a "
        "policy that lets every layer compute all of a prompt"
    )


def _over(places: Tensor, states: Tensor) -> Tensor:
    """`places` [rows, slots] as an index of `states` [rows, any, width] along its second dimension."""
    return places[..., None].expand(*places.shape, states.shape[-1])
