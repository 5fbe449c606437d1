"""Canonical Huffman codes (Huffman 1952) of at most 16 bits: what is stored of one is the length of each codeword.

The lengths are the best ones within that bound, by package-merge (Larmore and Hirschberg 1990). Codewords rise with
their length, and those of one length with the place of their symbol.
"""

import numpy as np
from numpy.typing import NDArray

from sparity.errors import CorruptFile

LONGEST = 16  # bits of a codeword
MOST_SYMBOLS = 2**LONGEST
LENGTH_BITS = 5  # of an entry of the table that decodes, for the length of its codeword


def code_lengths(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The lengths of the codewords that store symbols in the fewest bits.

    Args:
        counts: `[symbols]`, how often each occurs, above zero; 1 to `MOST_SYMBOLS` of them.

    Returns:
        `[symbols]`, 1 to `LONGEST` bits; 1 for a symbol that is alone.
    """
    order = counts.argsort(kind="stable")
    leaves = merged = counts[order]
    lengths = np.zeros(len(counts), dtype=np.uint8)
    if len(counts) == 1:
        return lengths + np.uint8(1)
    are_leaves = [np.ones(len(counts), dtype=bool)]
    for _ in range(LONGEST - 1):
        packages = merged[: len(merged) // 2 * 2].reshape(-1, 2).sum(1)
        both = np.concatenate((leaves, packages))
        places = both.argsort(kind="stable")
        merged = both[places]
        are_leaves.append(places < len(leaves))
    taken = 2 * len(counts) - 2
    for leaf in reversed(are_leaves):
        own = int(leaf[:taken].sum())
        lengths[order[:own]] += 1
        taken = 2 * (taken - own)
    return lengths


def check_lengths(what: str, lengths: NDArray[np.uint8]) -> None:
    """Raise `CorruptFile` unless `lengths` are those of a complete prefix code, or 1 for a symbol that is alone.

    A complete code gives every row of bits a meaning, and every symbol takes at least a bit.
    """
    if not 1 <= len(lengths) <= MOST_SYMBOLS:
        raise CorruptFile(f"{what}: a code of {len(lengths)} symbols; there are 1 to {MOST_SYMBOLS}")
    if int(lengths.min()) < 1 or int(lengths.max()) > LONGEST:
        raise CorruptFile(f"{what}: a codeword has 1 to {LONGEST} bits, not {lengths.min()} or {lengths.max()}")
    taken = int(_spans(lengths, LONGEST).sum())
    if taken != MOST_SYMBOLS and not (len(lengths) == 1 and lengths[0] == 1):
        over = "more codewords than there is room for" if taken > MOST_SYMBOLS else "fewer codewords than fit"
        raise CorruptFile(f"{what}: {over} in a code of such lengths ({taken} of {MOST_SYMBOLS} shares)")


def codewords(lengths: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The canonical codeword of each symbol as a number, its first bit the highest of as many as `lengths` says."""
    order, spans = lengths.argsort(kind="stable"), _spans(lengths, LONGEST)
    ends = spans[order].cumsum()
    words = np.empty(len(lengths), dtype=np.int64)
    words[order] = (ends - spans[order]) >> (LONGEST - lengths[order].astype(np.int64))
    return words


def decoding_table(lengths: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For the next bits of a stream, as many as the longest codeword has: the symbol that they begin with.

    Returns:
        `[2^longest]`: the symbol's place, shifted left by `LENGTH_BITS`, plus its length; 0 where a symbol that is
        alone leaves half of the bits without a meaning.
    """
    longest = int(lengths.max())
    order = lengths.argsort(kind="stable")
    entries = order << LENGTH_BITS | lengths[order]
    found = np.repeat(entries, _spans(lengths, longest)[order])
    return np.pad(found, (0, 2**longest - len(found)))


def _spans(lengths: NDArray[np.uint8], longest: int) -> NDArray[np.int64]:
    """How many rows of `longest` bits begin with each codeword."""
    return np.int64(1) << (longest - lengths.astype(np.int64))
