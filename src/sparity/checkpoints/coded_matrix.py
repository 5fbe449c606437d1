"""A packed matrix under a Huffman code, in the layout that takes the fewest bytes.

In place of the tensors of its format the file then has what they can be made from again:

    values_book     the stored values that occur, in the encoding's type, rising as bits
    values_code     uint8: their codewords' lengths, the bits of each chunk (int16), the codewords

In the layout `all` these are all values of the matrix, row after row, with 0 as one of them. In the layout `gaps` only
those that are not 0, and beside them `gaps_book` and `gaps_code`: how far each lies behind the one before it, 1 to 255.
Zeros are put in where more lie between, and at the end, so that the distances sum up to the whole matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparity.checkpoints.shards import ENTRY
from sparity.errors import CorruptFile
from sparity.formats import Encoding, Format, Packed, format_of
from sparity.formats.storage.huffman import MOST_SYMBOLS, check_lengths, code_lengths
from sparity.formats.storage.streams import chunks_of, decode, encode
from sparity.formats.storage.values import bits

ALL, GAPS = "all", "gaps"
VALUES = "values"
PARTS = {ALL: (VALUES,), GAPS: (VALUES, GAPS)}
FARTHEST = 255
SIZE = np.dtype("<i2")  # of a chunk in a file
DESCRIBED = 2 * ENTRY  # bytes of headers that a tensor takes: where it lies, and its hash
AT_ONCE = 1 << 20  # numbers
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass(frozen=True)
class Code:
    """The code of a row of numbers.

    Attributes:
        numbers: `[count]`, unsigned.
        book: those that occur, rising.
        counts: how often each occurs.
        lengths: of their codewords, in bits.
    """

    numbers: NDArray[Any]
    book: NDArray[Any]
    counts: NDArray[np.int64]
    lengths: NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Of book, lengths, sizes of chunks and stream, with what headers say of the two tensors."""
        streamed = -(-int(self.counts @ self.lengths.astype(np.int64)) // 8)
        sizes = SIZE.itemsize * chunks_of(len(self.numbers))
        return self.book.nbytes + self.lengths.nbytes + sizes + streamed + 2 * DESCRIBED

    def written(self) -> NDArray[np.uint8]:
        """Lengths, sizes and stream as bytes."""
        pieces = (self.numbers[first : first + AT_ONCE] for first in range(0, len(self.numbers), AT_ONCE))
        symbols = np.concatenate([self.book.searchsorted(piece).astype(np.uint16) for piece in pieces])
        sizes, stream = encode(symbols, self.lengths)
        return np.concatenate([self.lengths, sizes.astype(SIZE).view(np.uint8), stream])


def code_of(numbers: NDArray[Any]) -> Code | None:
    """The best code of `numbers` [count], at least one; None where more than `MOST_SYMBOLS` occur."""
    book, counts = np.unique(numbers, return_counts=True)
    return None if len(book) > MOST_SYMBOLS else Code(numbers, book, counts, code_lengths(counts))


def chosen_layout(packed: Packed) -> tuple[str, dict[str, Code]] | None:
    """The layout that takes fewer bytes, and the code of each of its parts; None where a matrix takes no more as it is.

    What headers say of the tensors is counted with them.
    """
    flat = _unsigned(format_of(packed).stored(packed))
    least = sum(own.nbytes + DESCRIBED for part, own in packed.tensors.items() if part not in packed.sides)
    found = None
    for layout, parts in ((ALL, {VALUES: flat}), (GAPS, dict(zip(PARTS[GAPS], _apart(flat), strict=True)))):
        codes = {part: code for part, numbers in parts.items() if (code := code_of(numbers)) is not None}
        size = sum(code.nbytes for code in codes.values())
        if codes.keys() == parts.keys() and size < least:
            found, least = (layout, codes), size
    return found


def coded(packed: Packed) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """What a file stores of a matrix, and what its header says of the code; nothing where no code makes it smaller."""
    chosen = chosen_layout(packed)
    if chosen is None:
        return packed.tensors, {}
    layout, codes = chosen
    stored = dict(packed.sides)
    for part, code in codes.items():
        book = torch.from_numpy(code.book)
        stored[f"{part}_book"] = book.view(packed.encoding.stored(packed.dtype)) if part == VALUES else book
        stored[f"{part}_code"] = torch.from_numpy(code.written())
    return stored, {"layout": layout, "count": len(codes[VALUES].numbers)}


def decoded(
    form: Format,
    encoding: Encoding,
    shape: tuple[int, int],
    dtype: torch.dtype,
    stored: Mapping[str, Tensor],
    said: Mapping[str, Any],
) -> Packed:
    """The matrix in its format again, from what `coded` gave, for what `check_said` has passed.

    Raises:
        CorruptFile: books, lengths, sizes and streams contradict each other.
        InvalidInput: a mask that the format cannot hold.
    """
    names = piece_names(said["layout"])
    sides = {name: tensor for name, tensor in stored.items() if name not in names}
    if sides.keys() != encoding.side_tensors(*shape).keys():
        raise CorruptFile(f"beside a code, the tensors {sorted(sides)} are none of the encoding {encoding.name}")
    kind, count = encoding.stored(dtype), said["count"]
    numbers = _numbers("the code of the values", stored, VALUES, kind, count)
    if said["layout"] == GAPS:
        gaps = _numbers("the code of the gaps", stored, GAPS, torch.uint8, count)
        numbers = _together(numbers, gaps, shape[0] * shape[1])
    return form.wrap(torch.from_numpy(numbers).view(kind).view(*shape), sides, dtype, encoding)


def check_said(where: str, entry: Mapping[str, Any], said: Any) -> None:
    """Raise `CorruptFile` unless `said`, of an entry's code, makes sense for its shape and its tensors."""
    if not isinstance(said, dict) or said.get("layout") not in PARTS or type(said.get("count")) is not int:
        raise CorruptFile(f"{where}: a code has a layout, {ALL} or {GAPS}, and a count, not {said!r:.80}")
    rows, columns = entry["shape"]
    size, count = rows * columns, said["count"]
    fits = count == size if said["layout"] == ALL else size <= FARTHEST * count and count <= size
    if not fits:
        raise CorruptFile(f"{where}: {count} values under a code do not make up {rows} x {columns}")
    if missing := sorted(set(piece_names(said["layout"])) - entry["hashes"].keys()):
        raise CorruptFile(f"{where}: its code lacks {', '.join(missing)}")


def piece_names(layout: str) -> tuple[str, ...]:
    """The names of the tensors that a layout stores."""
    return tuple(f"{part}_{piece}" for part in PARTS[layout] for piece in ("book", "code"))


def _numbers(what: str, stored: Mapping[str, Tensor], part: str, kind: torch.dtype, count: int) -> NDArray[Any]:
    """The numbers `[count]` of one part."""
    book, code = stored[f"{part}_book"], stored[f"{part}_code"]
    if book.dtype != kind or code.dtype != torch.uint8 or book.dim() != 1 or code.dim() != 1:
        raise CorruptFile(f"{what}: a book of {kind} and a code of bytes, each a list, not {book.dtype}, {code.dtype}")
    written, symbols = code.numpy(), len(book)
    begin = symbols + SIZE.itemsize * chunks_of(count)
    if len(written) < begin:
        raise CorruptFile(f"{what}: a code of {len(written)} bytes has no room for {symbols} lengths and its chunks")
    lengths, sizes = written[:symbols], np.frombuffer(written[symbols:begin].tobytes(), SIZE).astype(np.int16)
    check_lengths(what, lengths)
    return _unsigned(book).take(decode(what, written[begin:], sizes, lengths, count))


def _apart(flat: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Numbers `[size]` -> the values of the layout `gaps` and their distances, both `[count]`."""
    kept = np.flatnonzero(flat)
    ends = kept if len(kept) and kept[-1] == len(flat) - 1 else np.append(kept, len(flat) - 1)
    far = np.diff(ends, prepend=-1)
    steps = -(-far // FARTHEST)  # to each place, all but the first of them as far as can be
    places = np.repeat(ends - FARTHEST * (steps - 1), steps) + FARTHEST * _within(steps)
    return flat[places], np.diff(places, prepend=-1).astype(np.uint8)


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... up to each of `counts`, one after another."""
    found: NDArray[np.int64] = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return found


def _together(values: NDArray[Any], gaps: NDArray[np.uint8], size: int) -> NDArray[Any]:
    """The inverse of `_apart`."""
    places = gaps.cumsum(dtype=np.int64) - 1
    if not gaps.all() or int(places[-1]) != size - 1:
        raise CorruptFile(f"the gaps do not lead from the first weight to the last of {size}")
    flat = np.zeros(size, dtype=values.dtype)
    flat[places] = values
    return flat


def _unsigned(values: Tensor) -> NDArray[Any]:
    """The numbers of a tensor as bits, in a row."""
    words: NDArray[Any] = bits(values.contiguous()).numpy().reshape(-1).view(_UNSIGNED[values.element_size()])
    return words
