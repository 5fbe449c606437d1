"""Token windows: cut from documents the way the reference implementations do, or read as they are."""

import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from sparity.errors import CorruptFile, InvalidInput
from sparity.files import expand
from sparity.memory import check_memory


@dataclass(frozen=True)
class Windows:
    """How calibration windows are drawn: `samples` windows of `length` tokens, at random under `seed`."""

    samples: int
    length: int
    seed: int = 0
    documents: Literal["separate", "joined"] = "separate"


def draw_windows(documents: list[str], tokenizer: Any, windows: Windows) -> Tensor:
    """Windows `[samples, length]` of token ids, with the random draws of SparseGPT and Wanda.

    Draw a document, reject it unless it is longer than a window, then draw the window's start (Python's `random`,
    two draws per accepted document; `methods` of both papers' code). `documents: joined` first joins all documents
    with a blank line between them, for texts shorter than a window.

    Raises:
        InvalidInput: no document is long enough, or the windows do not fit into memory.
    """
    samples, length = windows.samples, windows.length
    check_memory(
        f"calibration of {samples:,} samples of {length:,} tokens",
        samples * length * torch.int64.itemsize,
        "take fewer or shorter samples",
    )
    if windows.documents == "joined":
        documents = ["\n\n".join(documents)]
    lengths: dict[int, int] = {}
    ids: dict[int, Tensor] = {}
    drawn = random.Random(windows.seed)
    chosen, filled = torch.empty(samples, length, dtype=torch.int64), 0
    while filled < samples:
        index = drawn.randint(0, len(documents) - 1)
        if index not in lengths:
            encoded = tokenizer(documents[index], verbose=False)["input_ids"]
            lengths[index] = len(encoded)
            if len(encoded) > length:
                ids[index] = torch.tensor(encoded, dtype=torch.int64)
        if index in ids:
            start = drawn.randint(0, len(ids[index]) - length - 1)
            chosen[filled] = ids[index][start : start + length]
            filled += 1
        elif not ids and len(lengths) == len(documents):
            advice = "take a smaller `length`"
            if windows.documents == "separate" and sum(lengths.values()) > length:
                advice += " or set `documents: joined`"
            raise InvalidInput(
                f"no document is longer than one window of {length} tokens "
                f"(documents: {len(documents)}, the longest: {max(lengths.values())} tokens): {advice}"
            )
    return chosen


def read_tokens(path: str | Path, dimensions: int) -> Tensor:
    """Token ids from a `.npy` file: 1-D for measuring, 2-D `[samples, length]` for calibration.

    Raises:
        InvalidInput: another shape, or numbers that are no token ids.
        CorruptFile: the file is not a numpy array, or truncated.
    """
    path = expand(path)
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        raise InvalidInput(f"token file {path} does not exist")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError, BadZipFile) as error:
        raise CorruptFile(f"{path} is not a numpy array of token ids ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise InvalidInput(f"{path}: token ids must be an array of integers, got {getattr(array, 'dtype', 'no array')}")
    if array.ndim != dimensions or array.size == 0:
        wanted = "[samples, length]" if dimensions == 2 else "[length]"
        raise InvalidInput(f"{path}: expected token ids of shape {wanted}, got {list(array.shape)}")
    return torch.from_numpy(array.astype(np.int64))


def token_hash(tokens: Tensor) -> str:
    """SHA-256 of shape and ids, so that two runs can be told to have seen the same tokens."""
    array = tokens.to(torch.int64).contiguous().numpy()
    return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()
