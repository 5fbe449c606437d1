"""What a policy must know of a model before it runs in it: found once, saved beside the weights, checked when read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparity.calibration import walk
from sparity.dynamic.cache.watching import watched
from sparity.models import Decoder

KEYS = ("k", "qkv")  # roles of the projection of keys


@dataclass(frozen=True)
class Sizes:
    """Of a block's attention: query heads, KV heads, numbers of a key, and of a hidden state."""

    heads: int
    kv_heads: int
    width: int
    hidden: int

    @classmethod
    def of(cls, config: Any) -> "Sizes":
        """Of a model with this configuration (of its text)."""
        heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        return cls(heads, kv_heads, int(getattr(config, "head_dim", None) or hidden // heads), hidden)


WORDS = {  # what is learned of a block -> its shape in words
    "retrieval": "bool [kv_heads], True for heads that keep everything",
    "gate": "float32 [kv_heads, hidden + 1], weights of a hidden state and a constant",
    "centres": "float32 [heads, width], the mean query of each head, not turned by its position",
    "spans": "float32 [heads, pairs], the mean size of each pair of a query's numbers that turn together",
}


def shape_of(name: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape of what is learned of a block; of `spans` the widest."""
    return {
        "retrieval": (sizes.kv_heads,),
        "gate": (sizes.kv_heads, sizes.hidden + 1),
        "centres": (sizes.heads, sizes.width),
        "spans": (sizes.heads, sizes.width // 2),
    }[name]


def misfit(name: str, found: Any, sizes: Sizes) -> str | None:
    """What is wrong with a tensor for a block of these sizes, or None."""
    shape, kind = shape_of(name, sizes), torch.bool if name == "retrieval" else torch.float32
    if not isinstance(found, Tensor) or found.dtype != kind or found.ndim != len(shape):
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        return f"{what}, not {str(kind).removeprefix('torch.')} {list(shape)}"
    fits = found.shape == shape or (name == "spans" and found.shape[0] == shape[0] and 1 <= found.shape[1] <= shape[1])
    if not fits:
        return f"{found.dtype} {list(found.shape)}, not {str(kind).removeprefix('torch.')} {list(shape)}"
    return None if found.dtype == torch.bool or bool(found.isfinite().all()) else "not finite"


@dataclass(frozen=True)
class Call:
    """One call of attention of a block, on one or more texts.

    Attributes:
        module: of attention.
        query: `[batch, heads, tokens, width]`, after rotary.
        key: `[batch, kv_heads, tokens, width]`, after rotary.
        value: `[batch, kv_heads, tokens, value_width]`.
        scaling: of logits.
        softcap: of logits.
        hidden: `[batch, tokens, hidden]`, what the projection of keys reads.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None
    hidden: Tensor


@dataclass(frozen=True)
class Study:
    """A model, for a policy that learns something of it.

    Attributes:
        decoder: the model.
        whole: of each block whether its cache holds the whole text.
        tokens: of texts, `[texts, length]`; None = there is no text.
    """

    decoder: Decoder
    whole: Sequence[bool]
    tokens: Tensor | None = None

    @property
    def sizes(self) -> Sizes:
        """Of every block."""
        return Sizes.of(self.decoder.config)

    def texts(self) -> Tensor:
        """The texts, where a policy reads them."""
        assert self.tokens is not None, "a policy that reads text is given some"
        return self.tokens

    def blocks(self, tokens: Tensor, see: Callable[[Call], None]) -> Iterator[int]:
        """Run block after block on texts `[texts, length]`; `see` is told each call, then the block's number comes."""
        hidden: list[Tensor] = []

        def told(module: nn.Module, states: tuple[Tensor, Tensor, Tensor], scaling: float, cap: float | None) -> None:
            rows = states[0].shape[0]
            inputs = hidden.pop()
            see(Call(module, *states, scaling, cap, inputs.reshape(rows, -1, inputs.shape[-1])))

        with watched(self.decoder.skeleton, told), torch.no_grad():
            for visit in walk(self.decoder, self.decoder.inputs(tokens)):
                with ExitStack() as watching:
                    for site in key_sites(visit.block.sites):
                        watching.enter_context(site.watch(hidden.append))
                    visit.finish()
                yield visit.block.index


def key_sites(sites: Sequence[Any]) -> list[Any]:
    """The input sites that feed projections of keys, block after block."""
    return [site for site in sites if any(each.role in KEYS for each in site.projections)]


Learned = Sequence[Mapping[str, Tensor]]  # of each block, by name
