"""Later calls of a text whose tokens went only so deep: those that are read now are first computed onward (LazyLLM)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparity.dynamic.cache.auxiliary import HIDDEN, Auxiliary
from sparity.dynamic.cache.prompt import MASK, tokenwise, unknown
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.store import Store
from sparity.dynamic.cache.weighing import AT_ONCE, refuse_unknown, weighted
from sparity.errors import InvalidInput


@dataclass(eq=False)
class Revival:
    """A later call, on its way through the layers with such earlier tokens as go deeper than they did.

    Between two choices all layers read the same tokens, and compute those of them that they do not hold. Rows that
    compute fewer than others repeat their first in front.

    Attributes:
        start: tokens of the text before the call, with padding.
        new: tokens of the call.
        tokens: of each row of the text, without padding; empty before the first layer was read.
        reading: bool `[rows, length]` on the CPU, the places that the present layer reads; None = all.
        chosen: those that the next layer reads; None = the same.
        places: of the slots in the text, int64 `[rows, slots]` on the CPU, ascending; None = the call's tokens.
        held: bool `[rows, slots]` on the CPU, which slots are tokens and not repetitions.
        given: what blocks are given of each slot, name -> `[rows, slots, ...]`.
        hidden: `[rows, new, width]`, of the call's tokens that went the states with which they did.
    """

    start: int
    new: int = 0
    tokens: list[int] = field(default_factory=list)
    reading: Tensor | None = None
    chosen: Tensor | None = None
    places: Tensor | None = None
    held: Tensor | None = None
    given: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None

    @property
    def narrowed(self) -> bool:
        """Whether the present layer reads or computes only some tokens."""
        return self.places is not None

    @property
    def length(self) -> int:
        """Of the text, with padding."""
        return self.start + self.new

    def read(self, sight: Sight) -> Tensor:
        """The places that the present layer reads, bool `[rows, length]` on the CPU; `sight` is of a whole text."""
        return sight.real() if self.reading is None else self.reading

    def choose(self, kept: Tensor, read: Tensor) -> None:
        """Let the next layer read only the places `kept`, of those that this one has `read`: bool `[rows, length]`."""
        self.chosen, self.reading = kept, read

    def enter(self, hidden: Tensor, given: Mapping[str, Any], auxiliary: Auxiliary | None) -> tuple[Tensor, Any]:
        """What the next block gets: its `hidden` states [rows, slots, width], and all else that it was to be `given`.

        Args:
            hidden: what the last block gave.
            given: by name, of the call's tokens.
            auxiliary: the tokens that stopped here.

        Raises:
            UnsupportedModel: it is not known how tokens are put into what is given.
        """
        assert auxiliary is not None, "tokens that stop are kept"
        if self.chosen is not None:
            if self.places is None:
                rows, self.new = hidden.shape[:2]
                self.given = {k: x.expand(rows, *x.shape[1:]) for k, x in tokenwise(given, self.new).items()}
            hidden = self._turn(hidden, auxiliary)
        return hidden, {name: self._replaced(name, value) for name, value in given.items()}

    def _turn(self, hidden: Tensor, auxiliary: Auxiliary) -> Tensor:
        """Tokens stop here, others go on from here; the hidden states of those that are computed from now on."""
        assert self.chosen is not None, "tokens were chosen"
        assert self.reading is not None, "tokens were chosen"
        places, held = self.places, self.held
        if places is None or held is None:
            places = torch.arange(self.start, self.length).expand(len(hidden), -1)
            held = self.reading[:, self.start :]
        self.hidden = self.widened(hidden) if self.narrowed else hidden
        kept, states = self.chosen.gather(1, places), {HIDDEN: hidden, **self.given}
        woken = auxiliary.wake(self.chosen)
        auxiliary.stop(places, held & ~kept, states)
        found = []
        for row, (going, more) in enumerate(zip(held & kept, woken, strict=True)):
            own = {name: each[row, going.to(each.device)] for name, each in states.items()}
            own["places"] = places[row, going].to(hidden.device)
            found.append({name: torch.cat([own[name], more[name]]) if more else own[name] for name in own})
        counts = torch.tensor([len(each["places"]) for each in found])
        self.held = torch.arange(-int(counts.max()), 0) >= -counts[:, None]
        laid = [_laid(each, int(counts.max())) for each in found]
        self.given = {name: torch.stack([each[name] for each in laid]) for name in laid[0]}
        self.places, self.reading, self.chosen = self.given.pop("places").cpu(), self.chosen, None
        return self.given.pop(HIDDEN)

    def _replaced(self, name: str, value: Any) -> Any:
        if name == MASK:
            return None  # attention knows the places
        if isinstance(value, tuple | list) and value and all(isinstance(each, Tensor) for each in value):
            return tuple(self._part(f"{name}.{number}", each) for number, each in enumerate(value))
        return self._part(f"{name}.0", value) if isinstance(value, Tensor) else value

    def _part(self, name: str, value: Tensor) -> Tensor:
        if name not in self.given and value.ndim > 1:
            raise unknown(name.rpartition(".")[0], value)
        return self.given.get(name, value)

    def widened(self, hidden: Tensor) -> Tensor:
        """`[rows, new, width]` of the call: `hidden` [rows, slots, width] where tokens go on, and where they went."""
        assert self.places is not None, "tokens were chosen"
        assert self.held is not None, "tokens were chosen"
        assert self.hidden is not None, "tokens were chosen"
        rows, slots = (self.held & (self.places >= self.start)).nonzero(as_tuple=True)
        found, device = self.hidden.clone(), hidden.device
        index = (rows.to(device), (self.places[rows, slots] - self.start).to(device))
        return found.index_put(index, hidden[index[0], slots.to(device)])

    def attend(self, query: Tensor, store: Store, scaling: float, **named: Any) -> Tensor:
        """`query` [rows, heads, slots, width] -> `[rows, slots, heads, value_width]`; logits are float32.

        Args:
            query: after rotary, of the slots.
            store: of the layer, these slots included.
            scaling: of logits.
            named: `softcap` and `s_aux`; see `attention.attend`.

        Raises:
            InvalidInput: tokens of an earlier call were padding then.
            UnsupportedModel: attention is given something else that may change it.
        """
        refuse_unknown(named)
        assert self.places is not None, "tokens were chosen"
        assert self.reading is not None, "tokens were chosen"
        rows, heads, slots, _ = query.shape
        grouped = query.reshape(rows, store.heads, heads // store.heads, slots, -1)
        drain = named.get("s_aux")
        drain = None if drain is None else drain.float().reshape(store.heads, -1, 1, 1)
        out = query.new_empty(*grouped.shape[:-1], store.value_width)
        for row in range(rows):
            keys, values = store.in_order(row, self.reading[row])
            there = self.reading[row].nonzero().flatten()
            if keys.shape[1] != len(there):
                raise InvalidInput("the attention mask shows tokens that it hid before: give the one of the whole text")
            for first in range(0, slots, AT_ONCE):
                cut = slice(first, first + AT_ONCE)
                hidden = (there > self.places[row, cut, None]).to(query.device)  # [queries, tokens]
                bias = torch.zeros(hidden.shape, device=query.device).masked_fill(hidden, -torch.inf)
                part = grouped[row, :, :, cut]
                out[row, :, :, cut] = weighted(part, keys, values, bias, scaling, named.get("softcap"), drain)
        return out.reshape(rows, heads, slots, -1).transpose(1, 2).contiguous()


def _laid(states: Mapping[str, Tensor], most: int) -> dict[str, Tensor]:
    """`states` [tokens, ...] in the order of their places, the first repeated in front so that there are `most`."""
    order = states["places"].argsort()
    order = torch.cat([order[:1].expand(most - len(order)), order])
    return {name: each[order] for name, each in states.items()}
