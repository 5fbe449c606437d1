"""One layer of a cache whose tokens a policy chooses; transformers sees the length of the text, not what is held."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from sparity.dynamic.cache.auxiliary import Auxiliary
from sparity.dynamic.cache.checks import check_right
from sparity.dynamic.cache.held import Held, Known, rows_apart
from sparity.dynamic.cache.joining import join, open_to
from sparity.dynamic.cache.pages import PagedStore
from sparity.dynamic.cache.policies.minicache import MiniCache
from sparity.dynamic.cache.prompt import Prompt
from sparity.dynamic.cache.quantised_store import QuantisedStore
from sparity.dynamic.cache.reading import Pages, read_of
from sparity.dynamic.cache.reviving import Revival
from sparity.dynamic.cache.run import Run, output_weight_of
from sparity.dynamic.cache.sight import Sight
from sparity.dynamic.cache.store import Holding, Store
from sparity.dynamic.cache.text_layer import TextLayer
from sparity.errors import InvalidInput, UnsupportedModel

ATTRIBUTE = "sparity_cache_layer"  # of the keys that go from a layer to attention


class PolicyLayer(TextLayer):
    """A layer of a `DynamicCache`.

    While it holds everything as it is, it returns it, as a dynamic layer does. Once tokens were evicted, quantised or
    merged, `update` returns only the new ones: attention reads what is held from `store`, and says when it has been
    read (`read`).

    Args:
        run: what is asked for.
        index: of the layer.
    """

    def __init__(self, run: Run, index: int) -> None:
        self.run, self.index = run, index
        self.partner: PolicyLayer | None = None  # the earlier layer with which it is merged
        self.merged: PolicyLayer | None = None  # of a layer without a pair: one with, so that both refuse alike
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        self.store: Holding | None = None
        self.auxiliary = Auxiliary()
        self.length = 0  # of the text
        self.evicted_at = 0  # its length at the last eviction; 0 = nothing was evicted
        self.partial = False  # whether only `store` can say what is held: something is gone, quantised or merged
        self.decoded = 0  # tokens since then that were decoded
        self.waiting = False  # for attention to read what the last update returned
        self.is_initialized = False

    @classmethod
    def of(cls, layer: DynamicLayer, run: Run, index: int) -> "PolicyLayer":
        """A layer with the tokens of an ordinary one."""
        taken = cls(run, index)
        if layer.get_seq_length():
            taken._hold(layer.keys, layer.values)
        return taken

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back as if they had never been."""
        return not self.settled and not self.run.policy.accumulates

    @property
    def settled(self) -> int:
        """Before which length tokens cannot be taken back; 0 = none."""
        beside = 0 if self.merged is None else self.merged.settled
        return max(self.evicted_at, beside, 0 if self.store is None else self.store.settled)

    @property
    def keys(self) -> Tensor | None:
        """All keys `[batch, kv_heads, tokens, width]`, or None where some are gone."""
        return None if self.store is None or self.partial else self.store.views()[0]

    @property
    def values(self) -> Tensor | None:
        """All values, likewise."""
        return None if self.store is None or self.partial else self.store.views()[1]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Hold new keys and values `[batch, kv_heads, new, width]`; what attention is to be given.

        Raises:
            InvalidInput: the model's attention no longer knows the cache.
            UnsupportedModel: attention did not read what an earlier update returned.
        """
        self.check_read()
        if (self.partial or self.settled) and not self.run.open:
            raise InvalidInput(
                "tokens of this cache were evicted, quantised or merged, and the policy is no longer attached to the "
                "model: use it within sparity.cache"
            )
        first, passing = self.store is None, self.run.passing
        if passing is not None and passing.narrowed:
            self._hold_some(key_states, value_states, passing)
        else:
            self._hold(key_states, value_states)
        if self.partial or first:
            keys, values = key_states, value_states  # themselves, so that gradients flow
        else:
            assert self.store is not None, "tokens are held"
            keys, values = self.store.views()[:2]
        if self.run.open:
            keys = keys.view_as(keys)  # what a model may keep of its own must not carry the mark
            setattr(keys, ATTRIBUTE, self)
            self.waiting = True
        return keys, values

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if self.store is None:
            self.store = self.run.store_of(keys, values, self.length, self.index)
        elif (self.store.rows, self.store.heads) != keys.shape[:2]:
            raise InvalidInput(f"the cache holds {self.store.rows} rows, the new tokens are of {keys.shape[0]}")
        else:
            self.store.append(keys, values, self.length)
        self.length += keys.shape[2]

    def _hold_some(self, keys: Tensor, values: Tensor, passing: Prompt | Revival) -> None:
        """Hold what a call computes of the text in this layer."""
        if self.store is None:
            self.lazy_initialization(keys, values)
            self.store = self.run.store_of(keys[:, :, :0], values[:, :, :0], 0, self.index)
        assert isinstance(self.store, Store), "tokens are stored as they are"
        assert passing.places is not None, "some tokens are computed"
        assert passing.held is not None, "some tokens are computed"
        self.store.add(keys, values, passing.places, passing.held)
        self.length = self.evicted_at = passing.length
        self.partial = True

    def check_read(self) -> None:
        """Refuse a model whose attention does not get the keys that `update` returned; raises `UnsupportedModel`."""
        if self.waiting:
            self.waiting = False
            raise UnsupportedModel(
                f"attention of layer {self.index} did not read from the cache: this architecture does not hand the "
                "cache's keys on to transformers' attention interface"
            )

    def read(self, module: nn.Module, query: Tensor, sight: Sight, scaling: float, softcap: float | None) -> None:
        """What attention calls when it has read: the policy may evict.

        Args:
            module: the attention module.
            query: `[batch, heads, new, width]`, after rotary.
            sight: what the queries see.
            scaling: of logits.
            softcap: of logits.
        """
        self.waiting = False
        store, new = self.store, query.shape[2]
        assert store is not None, "attention follows an update"
        if self.index >= self.run.layers:
            raise InvalidInput(f"the cache has a layer {self.index}, and the model {self.run.layers} layers")
        decoding = new < self.run.least and self.length > new
        if self.run.policy.narrows:
            return  # tokens go between layers, and nothing is evicted afterwards
        self.decoded += new if decoding else 0
        self._evict(module, query, sight, scaling, softcap, decoding)
        if not decoding and self.run.pending is None:
            self._quantise(sight, self.length)
            self._merge(sight)

    def _evict(
        self, module: nn.Module, query: Tensor, sight: Sight, scaling: float, softcap: float | None, decoding: bool
    ) -> None:
        """See `read`."""
        policy, store, scored = self.run.policy, self.store, self.run.policy.scores_all
        assert store is not None, "attention follows an update"
        due = not decoding or (self.run.decode and self.decoded >= self.run.every)
        if not due and not scored:
            return
        real = sight.real()
        heads = range(store.heads)
        budgets = [[self.run.budget(self.index, int(count), head) for head in heads] for count in real.sum(1)]
        due = due and self._exceeds(budgets, real)
        if due:
            check_right(real)
        if due and policy.rereads:
            self.run.pending = real
        if policy.rereads or (not due and not scored):
            return
        weight, masks = output_weight_of(module, query.shape[1]) if "output_weight" in policy.told else None, []
        hidden = self.run.hidden_of(self.index, query)
        known = Known(scaling, softcap, weight, self.run.rotary, self.run.learned[self.index], hidden)
        for rows in rows_apart(store, real):
            held = Held(store, rows, real, query, known)
            if scored:
                held.accumulate(policy)
            if due:
                masks += held.kept(self.run, self.index, budgets[rows[0]])
        if due:
            if policy.merges:
                assert isinstance(store, Store), "what is merged is stored as it is"
                masks = store.merge(masks, real)
            self.keep(masks)

    def keep(self, masks: Sequence[Tensor]) -> None:
        """Keep of every head, row by row, the slots that its mask `[slots]` names; the rest is evicted."""
        assert self.store is not None, "tokens are held"
        self.store.keep(masks)
        self.evicted_at, self.decoded, self.partial = self.length, 0, True

    def _quantise(self, sight: Sight, length: int) -> None:
        """Quantise what is no longer among the last tokens of a text of `length`, without padding."""
        store = self.store
        if not isinstance(store, QuantisedStore) or not bool(store.due(length).any()):
            return
        if not self.partial and int(sight.real()[:, :length].sum(1).max()) < store.residual + store.group:
            return  # but for padding
        self._without_padding(sight)
        store.quantise(store.due(length), length)
        self.partial = True

    def _merge(self, sight: Sight) -> None:
        """Merge with the earlier layer of a pair what both hold of the text but its ends."""
        policy, earlier = self.run.policy, self.partner
        if not isinstance(policy, MiniCache) or policy.retain >= 1 or earlier is None:
            return
        assert self.store is not None, "attention follows an update"
        candidates = open_to(self.store, sight.real(), (self.run.sinks, self.run.recent))
        if not bool(candidates.any()):
            return
        earlier._without_padding(sight)
        self._without_padding(sight)
        assert earlier.store is not None, "layers are read in their order"
        earlier.store, self.store = join(earlier.store, self.store, policy, candidates, self.run.recent)
        earlier.partial = self.partial = True

    def chosen(self, query: Tensor, sight: Sight, scaling: float, softcap: float | None) -> Pages | None:
        """Before attention: what fell out of the last tokens is quantised, and the pages that are read are chosen.

        None = everything is read: of several new tokens, of the first layers, and of what fits.
        """
        store, reader, new = self.store, self.run.reader, query.shape[2]
        if self.run.reading is not None:
            return None
        self._quantise(sight, self.length - new)
        if reader is None or self.run.whole or new > 1 or not isinstance(store, PagedStore | QuantisedStore):
            return None
        if isinstance(store, QuantisedStore) and not bool(store.packed.lengths.any()):
            return None
        real = sight.real()
        budgets = [self.run.read_budget(int(count)) for count in real.sum(1)]
        held = store.lengths.view(store.rows, -1).amax(1) if self.partial else real.sum(1)
        if all(max(budget, reader.pages * reader.page) >= int(n) for budget, n in zip(budgets, held, strict=True)):
            return None
        self._without_padding(sight)
        return read_of(store, self.run, query, budgets, self.length, scaling, softcap)

    def _without_padding(self, sight: Sight) -> None:
        """Let padding go, which is held until something else goes."""
        real = sight.real()
        assert self.store is not None, "attention follows an update"
        if self.partial or bool(real.all()):
            return
        check_right(real)
        self.store.keep([row for row in real for _ in range(self.store.heads)])
        self.partial = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back; their number is negative, as transformers gives it.

        Raises:
            InvalidInput: tokens were evicted since, or the policy added up what their queries paid.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to take back as a negative number, not {tokens_to_remove}"
            )
        if not tokens_to_remove or self.store is None:
            return
        length, policy = max(self.length + tokens_to_remove, 0), self.run.policy
        if policy.accumulates or length < self.settled:
            kept = "merged" if self.run.pairs else "quantised"
            gone = "evicted" if length < self.evicted_at else kept
            why = "has added up what they paid" if policy.accumulates else f"has {gone} others since"
            raise InvalidInput(
                f"tokens cannot be taken back from this cache: the policy {policy.name} {why}; generate without drafts "
                "(prompt lookup, assistants), or with a policy that evicts in prompts only"
            )
        self.store.crop(length)
        self.length, self.decoded = length, max(self.decoded + tokens_to_remove, 0)

    def _exceeds(self, budgets: list[list[int]], real: Tensor) -> bool:
        """Whether some row holds more real tokens than its heads may."""
        assert self.store is not None, "tokens are held"
        held = self.store.lengths.view(self.store.rows, -1).sum(1)
        if not self.partial:  # padding is held too
            held = real.sum(1) * self.store.heads
        return any(int(count) > sum(own) for count, own in zip(held, budgets, strict=True))
