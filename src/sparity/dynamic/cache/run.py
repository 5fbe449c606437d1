"""A policy at work in one model: what it is asked for, and what it knows of each attention module."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparity.dynamic.cache.auxiliary import Auxiliary
from sparity.dynamic.cache.coded_store import CodedStore
from sparity.dynamic.cache.learned import Learned
from sparity.dynamic.cache.pages import PagedStore
from sparity.dynamic.cache.policies.base import Policy, Reader, kept_of
from sparity.dynamic.cache.policies.kivi import Kivi
from sparity.dynamic.cache.policies.pqcache import PQCache
from sparity.dynamic.cache.prompt import Prompt
from sparity.dynamic.cache.quantised_store import QuantisedStore
from sparity.dynamic.cache.reviving import Revival
from sparity.dynamic.cache.rotary import Rotary
from sparity.dynamic.cache.store import Holding, Store
from sparity.errors import InvalidInput, UnsupportedModel

Share = float | tuple[float, ...]  # of a layer, or of each of its heads
PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")  # what attention modules call their output projection


@dataclass(eq=False)
class Run:
    """What a cache is to keep, of every layer.

    Attributes:
        policy: which tokens stay.
        keep: of each layer the share of the text's tokens that stay, up to 1, or their number; or of each of its heads.
        sinks: tokens at the start of each text that stay whatever the policy says.
        recent: tokens at its end.
        every: tokens between two evictions while decoding.
        decode: whether tokens are evicted while decoding.
        rotary: how positions turn queries and keys.
        codec: how what stays is stored; None = as it is.
        reader: which pages of it a query reads; None = everything.
        read_keep: the share of the text's tokens that it reads, or their number.
        learned: what was found of each layer before, by name.
        exact: whether a layer that holds and reads everything gives the bits of the model's own attention.
        pairs: layers that are merged with an earlier one, and with which.
        open: whether the model's attention still knows the cache.
        hidden: layer -> what its projection of keys reads in the present call, `[tokens, hidden]`, if the policy asks.
        pending: a prompt waits to be read again: bool `[rows, tokens]`, what of it is no padding.
        reading: what is read again at present.
        passing: the call whose tokens go only so deep, while it is read.
        auxiliaries: of each layer the tokens that stopped before it, in the cache of that call.
        whole: whether single tokens read everything that is held, whatever the reader chooses.
    """

    policy: Policy
    keep: Sequence[Share]
    sinks: int
    recent: int
    every: int
    decode: bool
    rotary: Rotary | None = None
    codec: Kivi | None = None
    reader: Reader | None = None
    read_keep: float = 1.0
    learned: Learned = ()
    exact: bool = True
    pairs: Mapping[int, int] = field(default_factory=dict)
    open: bool = field(default=True)
    whole: bool = False
    pending: Tensor | None = None
    reading: Any = None
    passing: Prompt | Revival | None = field(default=None, repr=False)
    auxiliaries: Sequence[Auxiliary] = field(default=(), repr=False)
    hidden: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Everything that is held is read within the context."""
        before, self.whole = self.whole, True
        try:
            yield
        finally:
            self.whole = before

    def __deepcopy__(self, memo: dict[int, Any]) -> "Run":
        return self  # copies of a cache belong to the same model

    def hidden_of(self, layer: int, query: Tensor) -> Tensor | None:
        """What a layer's projection of keys read for `query` [rows, heads, new, width]: `[rows, new, hidden]`."""
        found = self.hidden.pop(layer, None)
        return None if found is None else found.detach().reshape(query.shape[0], query.shape[2], -1)

    def rounds(self, length: int) -> bool:
        """Whether attention to all of a text may differ in rounding from the model's own.

        That is so where it was asked for, and in a model that reads only a part of the text in other layers.
        """
        if self.reader is None or self.whole:
            return not self.exact
        read = max(self.read_budget(length), self.reader.pages * self.reader.page)
        return read < length or not self.exact

    @property
    def layers(self) -> int:
        """How many the model has."""
        return len(self.keep)

    @property
    def least(self) -> int:
        """Calls that add fewer tokens to a text are decoding."""
        return self.policy.least

    def budget(self, layer: int, tokens: int, head: int = 0) -> int:
        """How many of a text's tokens stay in a layer's head: no fewer than are protected."""
        share = self.keep[layer]
        found = self.policy.budget(tokens, share[head] if isinstance(share, tuple) else share, layer, self.layers)
        first, last = self.protected(found)
        return min(max(found, first + last), tokens)

    def ragged(self, layer: int) -> bool:
        """Whether heads of a layer may hold different numbers of tokens."""
        return self.policy.ragged or isinstance(self.keep[layer], tuple)

    def read_budget(self, tokens: int) -> int:
        """How many of a text's tokens a query reads: no fewer than are protected."""
        return min(max(kept_of(tokens, self.read_keep), self.sinks + self.recent), tokens)

    def store_of(self, keys: Tensor, values: Tensor, first: int, layer: int) -> Holding:
        """What holds a layer's tokens; see `Store`."""
        mass = self.policy.scores_all
        if self.codec is not None:
            codec = self.codec
            return QuantisedStore(keys, values, first, mass, codec.bits, codec.group, codec.residual)
        if self.reader is not None and layer >= self.reader.dense_layers:
            if isinstance(self.reader, PQCache):
                return CodedStore(keys, values, first, mass, self.reader)
            return PagedStore(keys, values, first, mass, self.reader.page)
        return Store(keys, values, first, mass, weighed=self.policy.merges)

    def protected(self, budget: int) -> tuple[int, int]:
        """How many of the first and of the last tokens stay in any case."""
        first, last = self.policy.protected(budget)
        return max(first, self.sinks), max(last, self.recent)


def rotary_of(model: Any, policy: Policy) -> Rotary | None:
    """The rotary frequencies of a model, or None where it has none or the policy does not ask.

    Raises:
        UnsupportedModel: it has more than one set of them, or such that depend on the length, or none to turn keys by.
    """
    config = model.config.get_text_config(decoder=True)
    if "rotary" not in policy.told:
        return None
    found = model_rotary(model)
    if found is None and policy.turns:
        raise UnsupportedModel(f'"{config.model_type}" has no rotary positions: {policy.name} cannot count them anew')
    return found


def model_rotary(model: Any) -> Rotary | None:
    """The rotary frequencies of a model, or None where it has none.

    Raises:
        UnsupportedModel: it has more than one set of them, or such that depend on the length.
    """
    config = model.config.get_text_config(decoder=True)
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if not found:
        return None
    kind = getattr(found[0], "rope_type", "default")
    frequencies = getattr(found[0], "inv_freq", None)
    if not isinstance(frequencies, Tensor) or kind in ("dynamic", "longrope"):
        raise UnsupportedModel(
            f'the policy turns queries or keys, and rotary positions of "{config.model_type}" depend on the layer or '
            "on the length: take another policy"
        )
    return Rotary(frequencies.detach().float(), float(getattr(found[0], "attention_scaling", 1.0)))


def output_weight_of(module: nn.Module, heads: int) -> Tensor:
    """An attention module's output projection by head, `[heads, value_width, hidden]`.

    Raises:
        UnsupportedModel: it has none that is a dense matrix.
    """
    for name in PROJECTIONS:
        weight = getattr(getattr(module, name, None), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
            rows = weight if type(getattr(module, name)).__name__ == "Conv1D" else weight.T  # [heads * width, hidden]
            return rows.detach().reshape(heads, -1, rows.shape[1])
    raise UnsupportedModel(
        f"the policy weighs values by the output projection, and {type(module).__name__} has none that is dense"
    )


def check_request(policy: Policy, keep: float, sinks: int, recent: int, every: int, decode: bool | None) -> None:
    """Refuse what cannot be meant; raises `InvalidInput`."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not keep > 0 or (keep > 1 and int(keep) != keep):
        raise InvalidInput(f"keep {keep!r} must be a share in (0, 1] or a whole number of tokens from 2 on")
    for name, value, least in (("sinks", sinks, 0), ("recent", recent, 0), ("every", every, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidInput(f"{name} {value!r} must be a whole number, {least} or more")
    own = policy.protected(int(keep))
    if keep > 1 and policy.counts and (need := max(own[0], sinks) + max(own[1], recent)) > keep:
        raise InvalidInput(
            f"{policy.name} is to keep {keep:g} tokens, and {need} always stay (sinks, recent or the policy's window): "
            f"keep {need} or more, or protect fewer"
        )
    if policy.declines:
        raise InvalidInput(f"{policy.name}: {policy.declines}")
    if policy.revives and (every != 1 or decode is not None):
        raise InvalidInput(f"{policy.name} chooses anew at every call: leave `every` and `decode` out")
    if decode and not policy.evicts_while_decoding:
        raise InvalidInput(
            f"{policy.name} reads the queries of a prompt and cannot evict while decoding: leave `decode` out"
        )
