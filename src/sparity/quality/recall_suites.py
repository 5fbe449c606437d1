"""Contexts that ask for what they said: copies, pass keys, chains of variables, common words."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

from sparity.errors import InvalidInput
from sparity.quality.recall import Context, Question

NAMES = (
    "Ada",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Mary",
    "Noah",
)
WORDS = (
    *(
        "river",
        "table",
        "garden",
        "window",
        "letter",
        "bridge",
        "flower",
        "market",
        "winter",
        "doctor",
        "engine",
        "forest",
    ),
    *(
        "silver",
        "corner",
        "island",
        "kitchen",
        "mirror",
        "orange",
        "pocket",
        "school",
        "ticket",
        "village",
        "wagon",
        "yard",
    ),
)
Encode = Callable[[str], Sequence[int]]


def copies(
    words: int, *, length: int, asked: int = 8, answer: int = 4, count: int = 10, seed: int = 0
) -> list[Context]:
    """Random tokens; some of them come again, and those that followed are asked for.

    Args:
        words: tokens of the vocabulary to draw from.
        length: tokens of a context.
        asked: tokens that come again.
        answer: tokens that followed them.
        count: contexts, with one question each.
        seed: of the draw.

    Raises:
        InvalidInput: a context shorter than what is asked for.
    """
    if length < asked + answer:
        raise InvalidInput(f"a context of {length} tokens holds no {asked} and {answer}")
    drawn, found = random.Random(seed), []
    for _ in range(count):
        tokens = tuple(drawn.randrange(words) for _ in range(length))
        start = drawn.randrange(length - asked - answer + 1)
        middle, end = start + asked, start + asked + answer
        found.append(Context(tokens, (Question(tokens[start:middle], tokens[middle:end], length - end),)))
    return found


def pass_keys(
    encode: Encode, filler: Sequence[int], *, length: int, keys: int = 1, count: int = 10, seed: int = 0
) -> list[Context]:
    """Pass keys that stand in a text, each of which is asked for.

    Args:
        encode: a text as token ids, without special tokens.
        filler: token ids of a text to draw passages from.
        length: tokens of a context.
        keys: in each context, of different people.
        count: contexts.
        seed: of the draw.

    Raises:
        InvalidInput: more keys than names, or no room for them.
    """
    if not 1 <= keys <= len(NAMES):
        raise InvalidInput(f"keys {keys}: there are {len(NAMES)} names")
    drawn, found = random.Random(seed), []
    for _ in range(count):
        people = drawn.sample(NAMES, keys)
        numbers = [str(drawn.randrange(10000, 100000)) for _ in people]
        said = [encode(f" The pass key of {name} is {key}.") for name, key in zip(people, numbers, strict=True)]
        asked = [encode(f" What is the pass key of {name}? The pass key of {name} is") for name in people]
        found.append(_context(said, asked, [encode(f" {key}") for key in numbers], filler, length, drawn))
    return found


def variables(
    encode: Encode, filler: Sequence[int], *, length: int, steps: int = 2, count: int = 10, seed: int = 0
) -> list[Context]:
    """A number that is handed on from variable to variable, `steps` times; the last one is asked for.

    Args:
        encode: see `pass_keys`, as are all others but `steps`.
        filler: see there.
        length: see there.
        steps: assignments after the first.
        count: see there.
        seed: see there.
    """
    drawn, found = random.Random(seed), []
    for _ in range(count):
        names = drawn.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", steps + 1)
        key = str(drawn.randrange(10000, 100000))
        said = [encode(f" Variable {names[0]} = {key}.")]
        said += [encode(f" Variable {b} = variable {a}.") for a, b in pairwise(names)]
        asked = encode(f" The number of variable {names[-1]} is")
        found.append(_context(said, [asked], [encode(f" {key}")], filler, length, drawn, ordered=True))
    return found


def common_words(encode: Encode, *, length: int, often: int = 6, count: int = 10, seed: int = 0) -> list[Context]:
    """A list in which one word is `often` times as frequent as the others; it is asked for.

    Args:
        encode: see `pass_keys`, as are `length`, `count` and `seed`.
        length: see there.
        often: how many times as often.
        count: see there.
        seed: see there.
    """
    drawn, found = random.Random(seed), []
    for _ in range(count):
        common = drawn.choice(WORDS)
        others = [word for word in WORDS if word != common]
        tokens = list(encode("Words:"))
        last = 0
        while True:
            word = drawn.choice(others + [common] * often)
            more = encode(f" {word},")
            if len(tokens) + len(more) > length:
                break
            tokens += more
            last = len(tokens) if word == common else last
        asked = tuple(encode(" The most common word of this list is"))
        question = Question(asked, tuple(encode(f" {common}")), len(tokens) - last)
        found.append(Context(tuple(tokens), (question,)))
    return found


def _context(
    said: Sequence[Sequence[int]],
    asked: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    filler: Sequence[int],
    length: int,
    drawn: random.Random,
    ordered: bool = False,
) -> Context:
    """A passage of the filler with sentences at random places, in their order; `ordered` ones count from the first."""
    room = length - sum(map(len, said))
    if room < 0 or len(filler) < room:
        raise InvalidInput(
            f"a context of {length} tokens needs {sum(map(len, said))} for what it says and {max(room, 0)} of filler, "
            f"which has {len(filler)}"
        )
    start = drawn.randrange(len(filler) - room + 1)
    passage = filler[start : start + room]
    places = sorted(drawn.randrange(room + 1) for _ in said)
    tokens, ends, before = list[int](), list[int](), 0
    for place, sentence in zip(places, said, strict=True):
        tokens += [*passage[before:place], *sentence]
        ends.append(len(tokens))
        before = place
    tokens += passage[before:]
    ends = ends[:1] if ordered else ends
    found = [
        Question(tuple(question), tuple(answer), len(tokens) - end)
        for question, answer, end in zip(asked, answers, ends, strict=True)
    ]
    return Context(tuple(tokens), tuple(found))
