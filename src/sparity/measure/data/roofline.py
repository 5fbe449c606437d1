"""Whether a model can be faster at all: bytes and operations against what hardware can do.

The roofline (Williams, Waterman and Patterson 2009, Communications of the ACM 52:65): a product takes the longer of two
times, that of reading its operands and that of computing it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparity.measure.data.hardware import TWO_OF_FOUR, Hardware
from sparity.measure.data.outcome import Outcome, asks_for_zeros

BFLOAT16 = 2  # bytes
MASK = 1 / 8  # bytes of a bitmask per weight, and of the positions of 2:4
REAL = 1.05  # less is within the noise of any machine
STORED = "the output is plain: zeros are stored, read and computed like other numbers (output: {format: packed})"
DECODING = "zeros make decoding faster, not prompts: a packed matrix is read once for all tokens of a prompt"
LIBRARY = "only a library with products for 2:4 gains: a plain checkpoint in transformers computes all zeros"
ENGINE = "skipped channels save time on Sparity's engine only"


@dataclass(frozen=True)
class Load:
    """What a step costs: bytes that are read, operations, and seconds at the least."""

    bytes: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Shape:
    """What is done to a model, as far as its speed is concerned.

    Attributes:
        outcomes: the projections that stages had to do with.
        patterns: of each that has zeros, how they lie, in words.
        untouched: weights of all other projections.
        config: of the dense model.
        packed: whether zeros are left out of the files.
    """

    outcomes: tuple[Outcome, ...]
    patterns: Mapping[str, str]
    untouched: int
    config: Any
    packed: bool


@dataclass(frozen=True)
class Roof:
    """A model on one processor.

    Attributes:
        hardware: the processor.
        prompt: tokens of it.
        batch: sequences at once.
        dense: of one decoding step and of the prompt, of the dense model.
        sparse: the same of the model that is to be made.
        reasons: why zeros or skipped channels gain nothing there, or not everything.
    """

    hardware: Hardware
    prompt: int
    batch: int
    dense: tuple[Load, Load]
    sparse: tuple[Load, Load]
    reasons: tuple[str, ...]

    @property
    def gains(self) -> tuple[float, float]:
        """How many times as fast a step can be, and the prompt."""
        decode, prefill = (a.seconds / b.seconds for a, b in zip(self.dense, self.sparse, strict=True))
        return decode, prefill

    @property
    def real(self) -> bool:
        """Whether anything can be faster than in the dense model."""
        return max(self.gains) >= REAL


def roof(shape: Shape, hardware: Hardware, prompt: int = 512, batch: int = 1) -> Roof:
    """The least time of a decoding step and of a prompt, dense and sparse, with weights in bfloat16.

    Two criteria of a real gain are asked of every projection: something shrinks, bytes or operations, and the pattern
    is one that the processor, or our engine on it, reads. Bits of quantised weights are not counted.
    """
    config = shape.config.get_text_config()
    dense, sparse = [], []
    for decoding in (True, False):
        tokens = batch if decoding else batch * prompt
        same = [
            product(shape.untouched, 1.0, 1.0, tokens, hardware),
            product(config.vocab_size * config.hidden_size, 1.0, 1.0, batch, hardware),  # the head: last tokens only
            attention(config, prompt, batch, decoding, hardware),
        ]
        before, after = list(same), list(same)
        for one in shape.outcomes:
            read, computed = shares(one, shape, hardware, decoding)
            before.append(product(one.size_before, 1.0, 1.0, tokens, hardware))
            after.append(product(one.size, read, computed, tokens, hardware))
        dense.append(_sum(before))
        sparse.append(_sum(after))
    reasons = tuple(dict.fromkeys(_reasons(shape, hardware)))
    return Roof(hardware, prompt, batch, (dense[0], dense[1]), (sparse[0], sparse[1]), reasons)


def shares(one: Outcome, shape: Shape, hardware: Hardware, decoding: bool) -> tuple[float, float]:
    """The share of a projection's bytes that is read, and of its operations that is computed."""
    zeros = _zeros(one)
    if zeros and shape.patterns.get(one.name) == TWO_OF_FOUR and hardware.two_of_four:
        return 0.5 + MASK / BFLOAT16, 0.5
    if not (hardware.engine and decoding):
        return 1.0, 1.0
    left, without = 1 - (one.skipped or 0.0), bool(zeros) and shape.packed
    return (min(1.0, 1 - zeros + MASK / BFLOAT16) if without else 1.0) * left, (1 - zeros if without else 1.0) * left


def product(weights: float, read: float, computed: float, tokens: int, hardware: Hardware) -> Load:
    """A matrix with so many weights on so many inputs; inputs and outputs are small beside the weights."""
    return _load(weights * BFLOAT16 * read, 2.0 * weights * computed * tokens, hardware)


def attention(config: Any, prompt: int, batch: int, decoding: bool, hardware: Hardware) -> Load:
    """Keys and values of a prompt, and what its queries, or one after it, compute with them."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    cached = getattr(config, "num_key_value_heads", None) or heads
    one_query = 4.0 * layers * heads * width * prompt * batch
    flops = one_query if decoding else one_query * prompt / 2  # a token of the prompt sees half of it on average
    return _load(2.0 * layers * cached * width * prompt * batch * BFLOAT16, flops, hardware)


def _load(moved: float, flops: float, hardware: Hardware) -> Load:
    return Load(moved, flops, max(moved / hardware.bandwidth, flops / hardware.flops))


def _sum(loads: Iterable[Load]) -> Load:
    every = list(loads)
    return Load(*(sum(getattr(load, name) for load in every) for name in ("bytes", "flops", "seconds")))


def _zeros(one: Outcome) -> float:
    """The zeros that were asked for last; later stages keep them, and plans know nothing of others."""
    asked = [change.zeros for change in one.changes if asks_for_zeros(change)]
    return asked[-1] if asked else 0.0


def _reasons(shape: Shape, hardware: Hardware) -> Iterator[str]:
    for one in shape.outcomes:
        pattern = shape.patterns.get(one.name)
        if _zeros(one) and hardware.engine:
            yield DECODING if shape.packed else STORED
        elif _zeros(one) and pattern == TWO_OF_FOUR and hardware.two_of_four:
            yield LIBRARY
        elif _zeros(one):
            yield f"zeros that lie so ({pattern}) are computed like other numbers; it gains from {TWO_OF_FOUR} only"
        if one.skipped and not hardware.engine:
            yield ENGINE
