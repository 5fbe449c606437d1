"""Questions about long texts, made here from a seed: keys in filler, several keys, chains of variables, common words.

The kinds are those of RULER (Hsieh et al. 2024, arXiv:2404.06654) and of the pass-key test (Mohtashami and Jaggi 2023,
arXiv:2305.16300) in words of our own, so figures are comparable with each other and with no published table.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparity.errors import InvalidInput

BORDER = "\x1f"  # in a prompt: what stands before it is read, and may be evicted, before what stands behind it
KEYS, CHAINS, HOPS, OFTEN, SELDOM = 4, 4, 2, 8, 2
FILLER = (
    "The road runs along the river.", "A cart stands in the yard.", "The baker opens his shop early.",
    "Rain fell on the hills last night.", "Two boats lie at the pier.", "The clock in the hall is slow.",
    "Smoke rises over the village.", "A dog sleeps by the gate.",
)  # fmt: skip
COLOURS = ("amber", "blue", "crimson", "green", "ivory", "olive", "purple", "silver", "violet", "white")
WORDS = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbour", "island", "jacket", "kettle",
    "ladder", "market", "needle", "orange", "pencil", "quarry", "ribbon", "saddle", "tunnel", "valley", "window",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One question: `context` holds the answer, `choices[gold]` is it."""

    context: str
    question: str
    choices: tuple[str, ...]
    gold: int

    @property
    def text(self) -> str:
        """What a model reads."""
        return f"{self.context}\n\n{self.question}"


Build = Callable[[random.Random, float, int], Item]  # the draw, how deep the answer lies, how much filler


def generated(kind: str, encode: Callable[[str], Any], context: int, items: int, seed: int) -> list[Item]:
    """So many questions of a kind, each as long as fits into `context` tokens.

    Args:
        kind: of `KINDS`.
        encode: text -> token ids.
        context: tokens of the longest prompt with its longest choice.
        items: how many; the answers lie at depths from the start to the end of the text, evenly.
        seed: of the draw; an item depends on kind, seed and its number alone.

    Raises:
        InvalidInput: no such kind, or a context too short for a question without filler.
    """
    if kind not in KINDS:
        raise InvalidInput(f"long context {kind!r}: one of {', '.join(KINDS)}")
    return [_longest(KINDS[kind], encode, context, index, items, f"{kind} {seed} {index}") for index in range(items)]


def _longest(build: Build, encode: Callable[[str], Any], context: int, index: int, items: int, draw: str) -> Item:
    depth = index / (items - 1) if items > 1 else 0.5

    def fits(filler: int) -> bool:
        item = build(random.Random(draw), depth, filler)
        return max(len(encode(f"{item.text} {choice}")) for choice in item.choices) <= context

    low, high = 0, 1
    if not fits(low):
        raise InvalidInput(f"a context of {context} tokens is too short for this question: ask for more")
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return build(random.Random(draw), depth, low)


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10_000, 100_000))


def _numbers(draw: random.Random, count: int) -> list[str]:
    return [str(number) for number in draw.sample(range(10_000, 100_000), count)]


def _filled(draw: random.Random, lines: list[str], depth: float, filler: int) -> str:
    """Lines among so many sentences of filler: the first at the depth, the others anywhere."""
    text = [draw.choice(FILLER) for _ in range(filler)]
    for line in lines[1:]:
        text.insert(draw.randrange(len(text) + 1), line)
    text.insert(round(depth * len(text)), lines[0])
    return " ".join(text)


def _mixed(draw: random.Random, answer: str, others: list[str]) -> tuple[tuple[str, ...], int]:
    choices = [answer, *others]
    draw.shuffle(choices)
    return tuple(choices), choices.index(answer)


def _passkey(draw: random.Random, depth: float, filler: int) -> Item:
    key, *others = _numbers(draw, KEYS)
    context = _filled(draw, [f"The pass key is {key}. Remember it: {key} is the pass key."], depth, filler)
    return Item(context, "What is the pass key? The pass key is", *_mixed(draw, key, others))


def _several_keys(draw: random.Random, depth: float, filler: int) -> Item:
    names, keys = draw.sample(COLOURS, KEYS), _numbers(draw, KEYS)
    lines = [f"The key of the {name} door is {key}." for name, key in zip(names, keys, strict=True)]
    context = _filled(draw, lines, depth, filler)
    question = f"What is the key of the {names[0]} door? The key of the {names[0]} door is"
    return Item(context, question, *_mixed(draw, keys[0], keys[1:]))


def _variable_tracking(draw: random.Random, depth: float, filler: int) -> Item:
    """Chains `A = number`, `B = A`, `C = B`, each in its order, mixed with one another."""
    letters, values = draw.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", CHAINS * (HOPS + 1)), _numbers(draw, CHAINS)
    chains = [letters[start::CHAINS] for start in range(CHAINS)]
    text = [draw.choice(FILLER) for _ in range(filler)]
    for chain, value in zip(chains, values, strict=True):
        lines = [
            f"VAR {name} = {before}."
            for name, before in zip(chain, [value, *(f"VAR {x}" for x in chain)], strict=False)
        ]
        places = sorted(draw.randrange(len(text) + 1) for _ in lines)
        for place, line in reversed(list(zip(places, lines, strict=True))):
            text.insert(place, line)
    last = chains[0][-1]
    question = f"Follow the assignments. Which number does VAR {last} hold? VAR {last} ="
    return Item(" ".join(text), question, *_mixed(draw, values[0], values[1:]))


def _common_words(draw: random.Random, depth: float, filler: int) -> Item:
    """A list in which one word stands `OFTEN` times as often as each other; filler is more of the list."""
    common, *others = draw.sample(WORDS, KEYS + filler % (len(WORDS) - KEYS + 1))
    rounds = 1 + filler // (len(WORDS) - KEYS + 1)
    text = [common] * (OFTEN * rounds) + others * (SELDOM * rounds)
    draw.shuffle(text)
    question = "Which word is the most frequent one in the list? The most frequent word is"
    return Item("List: " + ", ".join(text) + ".", question, *_mixed(draw, common, others[: KEYS - 1]))


KINDS: dict[str, Build] = {
    "passkey": _passkey,
    "several_keys": _several_keys,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
}
