"""Packed matrices in a safetensors file: `docs/format.md`, "Packed matrices", is the specification."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparity.checkpoints.coded_matrix import check_said, coded, decoded
from sparity.checkpoints.shards import LazyTensors, check_header, unique_json, write_tensors
from sparity.errors import CorruptFile, InvalidInput, SparityError
from sparity.formats.base import LARGEST_SIDE, check_size, format_of
from sparity.formats.encodings.base import Encoding, build_encoding, unnamed_encoding
from sparity.formats.storage.packed import Packed
from sparity.formats.storage.values import DTYPE_NAMES, aligned, dtype_name

VERSION = 1
HEADER = "sparity"
CODED = "coded"  # of an entry: what is said of its Huffman code


def write(
    path: Path,
    matrices: Mapping[str, Packed],
    others: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    huffman: bool = False,
) -> None:
    """Write packed matrices, by name, and other tensors beside them as one file; complete or not at all.

    With `huffman` those matrices lie under a Huffman code that take fewer bytes so.

    Raises:
        InvalidInput: two names would give the same tensor.
        SparityError: the file cannot be written.
    """
    others, tensors, entries = others or {}, dict[str, Tensor](), dict[str, dict[str, Any]]()
    for name, packed in matrices.items():
        parts, code = coded(packed) if huffman else (packed.tensors, {})
        entries[name] = describe(packed, parts, code)
        for part, tensor in parts.items():
            key = f"{name}.{part}"
            if key in tensors or key in others:
                raise InvalidInput(f'two matrices would store the tensor "{key}"; rename one')
            tensors[key] = tensor
    header = {HEADER: json.dumps({"version": VERSION, "matrices": entries})}
    every = LazyTensors([*others, *tensors], lambda name: tensors[name] if name in tensors else others[name])
    write_tensors(path, every, {**(metadata or {}), **header})


def read(path: Path) -> dict[str, Packed]:
    """The packed matrices of a file that holds nothing else, by name, every hash and every content checked.

    Raises:
        CorruptFile: truncated, altered, of a later version, or with contents that contradict each other.
    """
    entries = read_entries(path)
    wanted = {f"{name}.{part}" for name, entry in entries.items() for part in entry["hashes"]}
    with _opened(path) as file:
        if wanted != set(file.keys()):
            raise CorruptFile(f"{path}: tensors and header differ in {sorted(wanted ^ set(file.keys()))[:3]}")
    return {name: read_matrix(path, name, entry) for name, entry in entries.items()}


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """What the header says of each matrix, by name: checked in itself, and that its tensors are there, but not read.

    Raises:
        CorruptFile: truncated, of a later version, or an entry that was altered, makes no sense or lacks its tensors.
    """
    check_header(path)
    with _opened(path) as file:
        entries = _entries(path, file.metadata() or {})
        wanted = [f"{name}.{part}" for name, entry in entries.items() for part in _parts(path, name, entry)]
        if missing := sorted(set(wanted) - set(file.keys())):
            raise CorruptFile(f"{path}: tensors and header differ in {missing[:3]}")
    if len(set(wanted)) < len(wanted):
        raise CorruptFile(f"{path}: two matrices share a tensor")
    for name, entry in entries.items():
        check_entry(f"{path}, {name}", entry)
    return entries


def read_matrix(path: Path, name: str, entry: Mapping[str, Any]) -> Packed:
    """One matrix of a file, its hashes and its content checked.

    Raises:
        CorruptFile: altered, or contents that contradict each other.
    """
    with _opened(path) as file:
        # copies: the tensors of a file are its memory, and a file may change while its model is used
        parts = {part: aligned(file.get_tensor(f"{name}.{part}").clone()) for part in entry["hashes"]}
    return restore(f"{path}, {name}", entry, parts)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from error


def describe(
    packed: Packed, stored: Mapping[str, Tensor] | None = None, code: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the header says about one matrix: format, options, shape, type, hash of each tensor and of the entry.

    Args:
        packed: the matrix.
        stored: its tensors as the file has them; without, as they are.
        code: what is said of their Huffman code, see `coded_matrix`.
    """
    stored = packed.tensors if stored is None else stored
    entry = {
        "format": packed.format,
        "options": dict(packed.options),
        "shape": list(packed.shape),
        "dtype": dtype_name(packed.dtype),
        "hashes": {part: tensor_hash(tensor) for part, tensor in stored.items()},
    }
    if packed.encoding != unnamed_encoding(stored):
        entry["encoding"] = {packed.encoding.name: packed.encoding.options}
    if code:
        entry[CODED] = dict(code)
    return {**entry, "hash": entry_hash(entry)}


def restore(where: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Packed:
    """The matrix that a header entry describes; `where` begins the message when it does not hold together.

    Raises:
        CorruptFile: an unknown format or encoding, a wrong hash, or tensors that contradict each other.
    """
    check_entry(where, entry)
    shape, dtype = entry["shape"], DTYPE_NAMES[entry["dtype"]]
    try:
        encoding = encoding_of(entry)
        packed = Packed(entry["format"], shape, dtype, tensors, entry["options"], encoding)
        form = format_of(packed)
    except InvalidInput as error:
        raise CorruptFile(f"{where}: {error}") from error
    for part, tensor in tensors.items():
        if tensor_hash(tensor) != entry["hashes"].get(part):
            raise CorruptFile(f'{where}: the tensor "{part}" was altered (its SHA-256 differs); fetch the file again')
    try:
        if CODED in entry:
            packed = decoded(form, encoding, (shape[0], shape[1]), dtype, tensors, entry[CODED])
        form.check(packed)
    except SparityError as error:
        raise CorruptFile(f"{where}: {error}") from error
    return packed


def encoding_of(entry: Mapping[str, Any]) -> Encoding:
    """The encoding of the values of a matrix, from its header entry.

    Raises:
        InvalidInput: no such encoding or option.
    """
    return build_encoding(entry["encoding"]) if "encoding" in entry else unnamed_encoding(entry["hashes"])


def check_entry(where: str, entry: Mapping[str, Any]) -> None:
    """Raise `CorruptFile` unless a header entry makes sense in itself and has its own hash."""
    try:
        rows, columns = entry["shape"]
        if not all(type(number) is int for number in (rows, columns, *entry["options"].values())):
            raise CorruptFile(f"{where}: shape and options must be whole numbers")
        if not (0 < rows <= LARGEST_SIDE and 0 < columns <= LARGEST_SIDE):
            raise CorruptFile(f"{where}: a weight of {rows} x {columns} cannot be")
        check_size(where, rows, columns)
        DTYPE_NAMES[entry["dtype"]]
        if not all(type(text) is str for text in (entry["format"], *entry["hashes"].values())):
            raise CorruptFile(f"{where}: format and hashes must be texts")
        if CODED in entry:
            check_said(where, entry, entry[CODED])
        if entry["hash"] != entry_hash({key: value for key, value in entry.items() if key != "hash"}):
            raise CorruptFile(f"{where}: its header entry was altered (its SHA-256 differs); fetch the file again")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"{where}: its header entry makes no sense ({error!r:.200})") from error


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a contiguous tensor's bytes, in hexadecimal."""
    flat = tensor.reshape(-1) if tensor.numel() else torch.empty(0, dtype=tensor.dtype)  # which has a stride of 1
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def entry_hash(entry: Mapping[str, Any]) -> str:
    """SHA-256 of a header entry without its own hash: JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _entries(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        header = unique_json(metadata[HEADER])
        version, matrices = header["version"], header["matrices"]
        if type(version) is int and version == VERSION and isinstance(matrices, dict):
            return matrices
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptFile(
            f'{path} holds no packed matrices: its "{HEADER}" header cannot be read ({error!r:.200})'
        ) from error
    raise CorruptFile(f"{path}: packed matrices of version {version!r:.40}; this Sparity reads {VERSION}")


def _parts(path: Path, name: str, entry: Any) -> list[str]:
    hashes = entry.get("hashes") if isinstance(entry, dict) else None
    if not isinstance(hashes, dict) or not all(part.isidentifier() for part in hashes):
        raise CorruptFile(f"{path}, {name}: its header entry names no tensors")
    return list(hashes)
