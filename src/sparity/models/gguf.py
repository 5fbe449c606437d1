"""GGUF files as models: dequantised once by transformers' own reader, into an ordinary folder that is kept."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from sparity.checkpoints.gguf_header import Header, read_header
from sparity.checkpoints.source import OutlineSource
from sparity.errors import CorruptFile, InvalidInput
from sparity.files import cache_folder, disk_errors, flush_folder, lock, make_folder
from sparity.models import gguf_tokenizer
from sparity.models import transformers as hf
from sparity.models.decoder import Decoder
from sparity.visible import logger

log = logger(__name__)

CONVERSION = 1  # raised when the same file would give another folder
DTYPE = torch.bfloat16


def is_gguf(path: Path) -> bool:
    """Whether a file looks like a GGUF file, by its name or its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def folder_of(path: Path) -> Path:
    """The Hugging Face folder of a GGUF file in bfloat16, made on first use and kept in the user's cache.

    The file is told by its path, size and time of change.

    Raises:
        SparityError: see `convert`.
    """
    real = path.resolve()
    try:
        status = real.stat()
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}") from error
    identity = f"{real} {status.st_size} {status.st_mtime_ns} {CONVERSION}"
    key = hashlib.sha256(os.fsencode(identity)).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]", "_", real.stem)[:80]
    target = cache_folder() / "gguf" / f"{stem}-{key}"
    if not target.is_dir():
        log.warning("%s is dequantised to bfloat16, once, in %s", path, target)
    return kept(target, lambda place: convert(real, place, _card(real)))


def kept(target: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache; where it is missing, `make` fills a temporary one that is then renamed.

    Of several processes one makes it and the others wait. What an interrupted one left is cleared away.
    """
    if target.is_dir():
        return target
    make_folder(target.parent)
    with lock(target.with_name(f"{target.name}.lock"), wait=True):
        if target.is_dir():  # another process made it meanwhile
            return target
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        try:
            make(partial)
            with disk_errors(target):
                _flush(partial)
                partial.rename(target)
                flush_folder(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def convert(file: Path, target: Path, card: str) -> None:
    """Write a GGUF file's model and tokenizer into the empty folder `target`, in bfloat16; tied embeddings stay tied.

    Raises:
        CorruptFile: the file is truncated, contradicts itself, or does not hold the model that it describes.
        InvalidInput: transformers' reader cannot read it.
        UnsupportedModel: an architecture that Sparity does not know.
        SparityError: the disk is full.
    """
    header = read_header(file)
    config = hf.gguf_config(file)
    _check_holds(file, header, config)
    model, missing = hf.load_gguf(file, DTYPE)
    if missing:
        raise CorruptFile(f"{file} lacks {len(missing)} tensors of the model, {missing[0]} among them")
    tokenizer = gguf_tokenizer.read(file, header)
    with disk_errors(target), hf.quiet():
        model.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        (target / "README.md").write_text(card, encoding="utf-8")


def _check_holds(file: Path, header: Header, config: object) -> None:
    """Refuse a file whose tensors are not those of the model that it describes, before memory is taken for it."""
    blocks = header.values.get(f"{header.architecture}.block_count", 0)
    if not isinstance(blocks, int) or not 0 < blocks <= len(header.tensors):
        raise CorruptFile(f"{file} is damaged: {blocks} blocks in {len(header.tensors)} tensors")
    left_out = [name for name in header.tensors if name.startswith("rope_")]
    if left_out:
        raise InvalidInput(
            f"{file} scales its rotary positions ({left_out[0]}), which transformers' reader of GGUF loses: use the "
            "model's safetensors"
        )
    skeleton = hf.empty_model(config, DTYPE)
    outline = OutlineSource(skeleton)
    Decoder(skeleton, outline, torch.device("cpu"), DTYPE)  # raises where the architecture is not known
    wanted = sum(torch.Size(shape).numel() for shape in outline.shapes().values())
    held = sum(torch.Size(stored.shape).numel() for stored in header.tensors.values())
    if wanted != held:
        raise CorruptFile(
            f"{file} holds {held:,} weights, and the model that it describes has {wanted:,}: it is damaged, or "
            "transformers' reader does not know this kind of file"
        )


def _flush(folder: Path) -> None:
    """Put every file on the disk, readable by whom the user's umask lets read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    flush_folder(folder)


def _card(file: Path) -> str:
    return (
        f"# {file.stem}\n\nDequantised to bfloat16 by Sparity, through transformers, from the GGUF file {file}. Where "
        "that was quantised, these weights lie on its grid, and quantising them again to as many bits is nearly free.\n"
    )
