"""Symbols as the bits of a Huffman code: cut into chunks, which are decoded side by side.

A stream has the codewords one after another, each with its first bit highest in the byte, and zeros up to a whole byte.
Beside it lies how many bits each chunk takes, so that every chunk can be entered.
"""

import numpy as np
from numpy.typing import NDArray

from sparity.errors import CorruptFile
from sparity.formats.storage.huffman import LENGTH_BITS, codewords, decoding_table

CHUNK = 512  # symbols; its bits, at most 16 each, fit int16
AT_ONCE = 1024  # chunks, so that what is computed stays in the cache
WORD = 32  # bits
HALF = 16  # bits; a codeword that begins in one half word ends in the next


def chunks_of(count: int) -> int:
    """Chunks of so many symbols."""
    return -(-count // CHUNK)


def encode(symbols: NDArray[np.uint16], lengths: NDArray[np.uint8]) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """`symbols` [count], below the number of codewords -> the bits of each chunk `[chunks]`, the stream `[bytes]`."""
    words, sizes = codewords(lengths), np.empty(chunks_of(len(symbols)), dtype=np.int16)
    total = int(np.bincount(symbols, minlength=len(lengths)) @ lengths.astype(np.int64))
    stream, begin = np.zeros(total // WORD + 2, dtype=np.uint64), 0
    for first in range(0, len(symbols), AT_ONCE * CHUNK):
        some = symbols[first : first + AT_ONCE * CHUNK]
        bits = lengths[some].astype(np.int64)
        ends = begin + bits.cumsum()
        edges = np.arange(0, len(some), CHUNK)
        sizes[first // CHUNK :][: len(edges)] = np.add.reduceat(bits, edges)
        starts = ends - bits
        moved = words[some].astype(np.uint64) << (2 * WORD - (starts % WORD) - bits).astype(np.uint64)
        home = starts // WORD
        news = np.flatnonzero(np.diff(home, prepend=-1))
        joined = np.bitwise_or.reduceat(moved, news)
        stream[home[news]] |= joined >> np.uint64(WORD)
        stream[home[news] + 1] |= joined & np.uint64(2**WORD - 1)
        begin = int(ends[-1])
    return sizes, stream.astype(">u4").view(np.uint8)[: -(-total // 8)].copy()


def decode(
    what: str, stream: NDArray[np.uint8], sizes: NDArray[np.int16], lengths: NDArray[np.uint8], count: int
) -> NDArray[np.uint16]:
    """The inverse of `encode`, for `lengths` that `check_lengths` has passed.

    Raises:
        CorruptFile: its message begins with `what`; stream, sizes and count contradict each other. Nothing is made
            that is larger than what `sizes` and `stream` can stand for.
    """
    if len(sizes) != chunks_of(count):
        raise CorruptFile(f"{what}: {count} symbols have {chunks_of(count)} chunks, but {len(sizes)} have a size")
    if len(sizes) and int(sizes.min()) < 1:
        raise CorruptFile(f"{what}: a chunk takes {sizes.min()} bits")
    wide = sizes.astype(np.int64)
    ends = wide.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    if total < count:
        raise CorruptFile(f"{what}: {count} symbols take a bit each at least, but the chunks have {total} bits")
    if len(stream) != -(-total // 8):
        raise CorruptFile(f"{what}: the chunks take {total} bits, but {len(stream)} bytes are stored")
    if total % 8 and stream[-1] & (0xFF >> total % 8):
        raise CorruptFile(f"{what}: bits are stored behind the last of {total}")
    windows, table, longest = _windows(stream), decoding_table(lengths), int(lengths.max())
    found = np.empty(count, dtype=np.uint16)
    for first in range(0, len(sizes), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        symbols = found[first * CHUNK : (first + AT_ONCE) * CHUNK]
        if not np.array_equal(_side_by_side(symbols, windows, table, longest, ends[some] - wide[some]), ends[some]):
            raise CorruptFile(f"{what}: a chunk ends elsewhere than its size says")
    return found


def _windows(stream: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """For every half word of a stream, that one and the next, as one number."""
    padded = np.zeros(len(stream) // 2 * 2 + 6, dtype=np.uint8)
    padded[: len(stream)] = stream
    halves = padded.view(">u2").astype(np.uint32)
    windows: NDArray[np.uint32] = halves[:-1] << np.uint32(HALF) | halves[1:]
    return windows


def _side_by_side(
    symbols: NDArray[np.uint16],
    windows: NDArray[np.uint32],
    table: NDArray[np.int64],
    longest: int,
    places: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Decode chunks that begin at bits `places` [chunks] into `symbols`, one of each chunk at a time -> where they end.

    All but the last have `CHUNK` symbols. A place beyond the stream reads its last bits: no memory is left.
    """
    last = len(symbols) - (len(places) - 1) * CHUNK
    entries = np.zeros((CHUNK, len(places)), dtype=np.int64)
    drop, reached = np.uint32(2 * HALF - longest), places.copy()
    for step in range(CHUNK):
        active = reached if step < last else reached[:-1]
        bits = windows.take(active >> 4, mode="clip") << (active & (HALF - 1)).astype(np.uint32)
        entry = table.take(bits >> drop)
        active += entry & (2**LENGTH_BITS - 1)
        entries[step, : len(active)] = entry
    symbols[:] = (entries >> LENGTH_BITS).astype(np.uint16).T.reshape(-1)[: len(symbols)]
    return reached
