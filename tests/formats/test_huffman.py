"""Huffman codes and their streams: by hand, against the plain algorithms, the entropy bound, and any symbols back."""

import heapq
from itertools import pairwise, product
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity.errors import CorruptFile
from sparity.formats.storage import huffman, streams
from sparity.formats.storage.huffman import check_lengths, code_lengths, codewords, decoding_table
from sparity.formats.storage.streams import CHUNK, chunks_of, decode, encode

COUNTS = st.lists(st.integers(1, 100), min_size=1, max_size=40)  # a codeword of 17 bits takes 4,181 of them (Fibonacci)


def lengths_of(counts):
    return code_lengths(np.array(counts, dtype=np.int64))


def bits(counts, lengths):
    return sum(count * int(length) for count, length in zip(counts, lengths, strict=True))


def merged(counts):
    """Bits of Huffman's tree: the two rarest are joined until one is left, and every join is a bit for each below."""
    heap, total = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    return total


def by_bits(stream, lengths, count):
    """Decoded bit by bit, each codeword looked up in a dictionary."""
    words = {
        format(word, f"0{length}b"): place
        for place, (word, length) in enumerate(zip(codewords(lengths), lengths, strict=True))
    }
    found, read = [], ""
    for bit in "".join(format(byte, "08b") for byte in stream):
        read += bit
        if read in words and len(found) < count:
            found.append(words[read])
            read = ""
    return found


def drawn(seed, count, symbols=12):
    """Some symbols much more often than others; all occur."""
    generator = np.random.default_rng(seed)
    found = np.minimum(generator.geometric(0.3, count) - 1, symbols - 1).astype(np.uint16)
    return np.unique(found, return_inverse=True)[1].astype(np.uint16)


def test_a_code_by_hand():
    lengths = lengths_of([5, 1, 1, 2])
    assert lengths.tolist() == [1, 3, 3, 2]
    assert [format(word, f"0{length}b") for word, length in zip(codewords(lengths), lengths, strict=True)] == [
        "0",
        "110",
        "111",
        "10",
    ]
    sizes, stream = encode(np.array([0, 3, 1, 0, 2, 3, 0, 0, 0], dtype=np.uint16), lengths)
    assert [format(byte, "08b") for byte in stream] == ["01011001", "11100000"]  # 0 10 110 0 111 10 0 0 0 and a zero
    assert sizes.tolist() == [15]
    assert decoding_table(lengths).tolist() == [1, 1, 1, 1, 3 << 5 | 2, 3 << 5 | 2, 1 << 5 | 3, 2 << 5 | 3]


def test_a_symbol_that_is_alone_takes_a_bit():
    lengths = lengths_of([7])
    assert lengths.tolist() == [1]
    sizes, stream = encode(np.zeros(7, dtype=np.uint16), lengths)
    assert (sizes.tolist(), stream.tolist()) == ([7], [0])
    assert decode("a code", stream, sizes, lengths, 7).tolist() == [0] * 7
    with pytest.raises(CorruptFile, match="a chunk ends elsewhere"):
        decode("a code", stream | 0b0100, sizes, lengths, 7)  # the half of the code that means nothing


@settings(max_examples=200, deadline=None)
@given(counts=COUNTS)
def test_the_lengths_are_optimal_and_within_a_bit_of_the_entropy(counts):
    lengths = lengths_of(counts)
    check_lengths("a code", lengths)
    taken, total = bits(counts, lengths), sum(counts)
    assert taken == (merged(counts) if len(counts) > 1 else total)
    entropy = sum(count * log2(total / count) for count in counts)
    assert entropy <= taken + 1e-6 * total
    assert taken <= entropy + total
    for one, other in product(range(len(counts)), repeat=2):
        assert counts[one] <= counts[other] or lengths[one] <= lengths[other]


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 300), min_size=2, max_size=6), longest=st.integers(3, 4))
def test_of_all_codes_that_are_short_enough_it_is_the_best(counts, longest):
    best = min(
        bits(counts, lengths)
        for lengths in product(range(1, longest + 1), repeat=len(counts))
        if sum(2.0**-length for length in lengths) <= 1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huffman, "LONGEST", longest)
        lengths = lengths_of(counts)
    assert bits(counts, lengths) == best
    assert int(lengths.max()) <= longest


def test_a_code_that_would_be_longer_stays_complete():
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])  # Huffman's longest codeword would have 29 bits
    lengths = lengths_of(counts)
    check_lengths("a code", lengths)
    assert int(lengths.max()) == 16
    assert merged(counts) < bits(counts, lengths) < 1.001 * merged(counts)
    most = lengths_of([1] * 2**16)
    check_lengths("a code", most)
    assert set(most.tolist()) == {16}


@settings(max_examples=50, deadline=None)
@given(counts=COUNTS)
def test_no_codeword_begins_another_and_they_rise(counts):
    lengths = lengths_of(counts)
    words = [format(word, f"0{length}b") for word, length in zip(codewords(lengths), lengths, strict=True)]
    ordered = sorted(words)
    assert all(not after.startswith(before) for before, after in pairwise(ordered))
    assert ordered == sorted(words, key=len)  # canonical: shorter ones first
    assert [words[place] for place in np.argsort(lengths, kind="stable")] == ordered


@pytest.mark.parametrize("count", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 7 * CHUNK + 3])
@pytest.mark.parametrize("at_once", [1, 3, 1024])
def test_symbols_come_back_however_many_chunks_are_decoded_at_once(count, at_once, monkeypatch):
    monkeypatch.setattr(streams, "AT_ONCE", at_once)
    symbols = drawn(count, count)
    counts = np.bincount(symbols)
    lengths = code_lengths(counts)
    sizes, stream = encode(symbols, lengths)
    assert len(sizes) == chunks_of(count)
    assert int(sizes.sum()) == bits(counts, lengths)
    assert len(stream) == -(-int(sizes.sum()) // 8)
    assert decode("a code", stream, sizes, lengths, count).tolist() == symbols.tolist()
    assert by_bits(stream, lengths, count) == symbols.tolist()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_symbols_under_any_code_come_back(data):
    counts = data.draw(st.lists(st.integers(1, 10**9), min_size=1, max_size=300))
    lengths = lengths_of(counts)
    symbols = data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=60))
    repeated = np.array(symbols * data.draw(st.integers(1, 40)), dtype=np.uint16)
    sizes, stream = encode(repeated, lengths)
    assert decode("a code", stream, sizes, lengths, len(repeated)).tolist() == repeated.tolist()


def test_codewords_of_sixteen_bits_fill_a_chunk():
    lengths = lengths_of([1] * 2**16)
    symbols = np.arange(2**16, dtype=np.uint16)[:: 2**5][: 2 * CHUNK]
    sizes, stream = encode(symbols, lengths)
    assert sizes.tolist() == [16 * CHUNK] * 2
    assert decode("a code", stream, sizes, lengths, len(symbols)).tolist() == symbols.tolist()
