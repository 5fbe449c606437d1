"""The rows of a text file; what it is, is told from its content as well as its name."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from gzip import GzipFile
from pathlib import Path
from typing import IO, Any

from sparity.errors import CorruptFile, InvalidInput
from sparity.memory import available_memory

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
COMPRESSED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".zstd": b"\x28\xb5\x2f\xfd"}
SUFFIXES = {".txt", ".md", ".json", ".parquet", ".npy", *JSON_LINES, *COMPRESSED}
PARQUET = b"PAR1"
PIECE = 1 << 20  # bytes read at once
ZSTD_PIECE = 1 << 11  # compressed ones: three of them may stand for 128 KiB
COPIES = 8  # of a text in memory at once, in bytes for one of the file: its characters, documents and tokens
PROBED = 3  # lines of JSON that make a text look like JSON lines


def read_rows(path: Path) -> list[Any]:
    """A row per document of a jsonl, json or parquet file, compressed or not, or the whole of a text file as one.

    Raises:
        CorruptFile: not what its name or its beginning says.
        InvalidInput: it cannot be read, is no list of rows, looks like JSON under a name of plain text, or does not fit
            into memory.
    """
    with _opened(path) as file:
        beginning = file.read(4)
    name, content = path, b""
    if path.suffix in COMPRESSED or beginning.startswith(tuple(COMPRESSED.values())):
        content = _decompressed(path, beginning)
        name = path.with_suffix("") if path.suffix in COMPRESSED else path
    elif path.suffix == ".parquet" or beginning == PARQUET:
        return _read_parquet(path)
    else:
        with _opened(path) as file:
            content = _gathered(_pieces(file), path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptFile(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if name.suffix in JSON_LINES:
        return list(_lines(text, path))
    if name.suffix == ".json":
        return _json_rows(text, path)
    if kind := _looks_like_json(text):
        named = f"{name.stem or 'text'}{JSON_LINES[0] if kind == 'JSON lines' else '.json'}"
        raise InvalidInput(f"{path} looks like {kind}, and its name says plain text: name it {named} to read its rows")
    return [text]


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error


def _gathered(pieces: Iterable[bytes], path: Path) -> bytes:
    """The whole of a file, unless that is more than fits into memory; a small compressed one may be endless."""
    available = available_memory()
    most = None if available is None else available // COPIES
    found, size = [], 0
    for piece in pieces:
        size += len(piece)
        if most is not None and size > most:
            raise InvalidInput(
                f"{path} holds more than {most / 1e9:,.1f} GB of text, more than fits into memory: take a part of it"
            )
        found.append(piece)
    return b"".join(found)


def _decompressed(path: Path, beginning: bytes) -> bytes:
    if path.suffix in COMPRESSED and not beginning.startswith(COMPRESSED[path.suffix]):
        raise CorruptFile(f"{path} is not compressed as its name says; fetch it again, or take {path.suffix} off it")
    try:
        if beginning.startswith(COMPRESSED[".gz"]):
            with gzip.open(path) as file:
                return _gathered(_pieces(file), path)
        with path.open("rb") as file:
            return _gathered(_zstd_pieces(file, path), path)
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptFile(f"{path} is truncated or damaged ({error}); fetch it again") from error


def _pieces(file: IO[bytes] | GzipFile) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        yield piece


def _zstd_pieces(file: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise InvalidInput(f"{path}: reading zstd needs zstandard: pip install 'sparity[data]'") from error
    frame, rest = zstandard.ZstdDecompressor().decompressobj(), b""
    try:
        while compressed := rest or file.read(ZSTD_PIECE):
            if frame.eof:  # another frame follows
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(compressed)
            rest = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise CorruptFile(f"{path} is truncated or damaged ({error}); fetch it again") from error
    if not frame.eof:
        raise CorruptFile(f"{path} is truncated; fetch it again")


def _lines(text: str, path: Path) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold U+2028 and its like
        if line.strip():
            yield _parse(line, f"{path}, line {number}")


def _json_rows(text: str, path: Path) -> list[Any]:
    """The rows of a list, or of JSON lines, which many data sets call `.json`."""
    try:
        rows = _parse(text, str(path))
    except CorruptFile:
        if not _is_lines(text):
            raise
        return list(_lines(text, path))
    if not isinstance(rows, list):
        raise InvalidInput(f"{path}: expected a list of texts or of objects, got {type(rows).__name__}")
    return rows


def _looks_like_json(text: str) -> str | None:
    """Which kind of JSON a text seems to be, by its first lines or as a whole."""
    if _is_lines(text):
        return "JSON lines"
    if text.lstrip()[:1] != "[":
        return None
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return "JSON" if rows and all(isinstance(row, dict | str) for row in rows) else None


def _is_lines(text: str) -> bool:
    """Whether the first lines are JSON objects, each on a line of its own."""
    found, start = 0, 0
    while found < PROBED and start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line, start = text[start:end].strip(), end + 1
        if not line:
            continue
        if not line.startswith("{"):
            return False
        try:
            if not isinstance(json.loads(line), dict):
                return False
        except (ValueError, RecursionError):
            return False
        found += 1
    return found > 0


def _parse(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{where} is not JSON ({error})") from error


def _read_parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise InvalidInput(f"{path}: reading parquet needs pyarrow: pip install 'sparity[data]'") from error
    try:
        return list(read_table(path).to_pylist())
    except (ArrowException, OSError) as error:
        raise CorruptFile(f"{path} is not a parquet file, or damaged ({error})") from error
