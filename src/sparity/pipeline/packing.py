"""Checkpoints from plain to packed and back: shard by shard, every tensor bit for bit."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sparity.engine.formats.conversions.smallest import smallest_format
from sparity.errors import InvalidInput
from sparity.files import expand, file_hash, read_json_object, write_atomically, write_json
from sparity.models import Decoder, packed
from sparity.models import transformers as hf
from sparity.models.packed import INDEX
from sparity.models.source import CheckpointSource
from sparity.pipeline.export import shard_name, write_plain_index
from sparity.pipeline.folder import RunFolder
from sparity.pipeline.output import refuse_to_replace
from sparity.shards import LazyTensors, write_tensors

Layout = Literal["plain", "packed"]
Stored = Literal["same", "int8"]
OTHER_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack"
)  # fmt: skip


def convert(source: str | Path, target: str | Path, values: Stored = "same", force: bool = False) -> Layout:
    """Write a checkpoint in the other layout: packed from plain, plain from packed; what it became is returned.

    Every tensor comes back bit for bit, unless `values` is "int8": then packed matrices are quantised, with a scale per
    output.

    Raises:
        InvalidInput: no such model, or a model of an architecture that Sparity does not know.
        CorruptFile: the checkpoint is damaged.
        RunConflict: the target exists.
    """
    folder = hf.locate(source)
    refuse_to_replace(folder, expand(target))
    decoder = Decoder.open(folder)
    to: Layout = "plain" if isinstance(decoder.source, CheckpointSource) and decoder.source.packed else "packed"
    if to == "plain" and values != "same":
        raise InvalidInput(f"{folder} is packed already: convert it to plain first, then pack it with values {values}")
    identity = {"convert": decoder.source.fingerprint(), "to": to, "values": values}
    with RunFolder.open(expand(target), identity, force, resume=True) as work:
        if to == "packed":
            pack_weights(decoder, work.path, values)
        else:
            _unpack_weights(decoder, work.path)
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.endswith(OTHER_WEIGHTS):
                write_atomically(work.path / path.name, partial(shutil.copyfile, path))
        packed.mark(work.path, to == "packed")
        _rewrite_record(work.path, to, recount=values == "int8")
        work.publish()
    return to


def pack_in_place(folder: Path, values: Stored) -> None:
    """Turn the plain checkpoint in a run's working folder into a packed one; what was stopped half-way is finished."""
    if not is_packed(folder):
        pack_weights(Decoder.open(folder), folder, values)
    shards = set(folder.glob("sparity-*.safetensors"))
    packed.remove_other_weights(folder, shards)
    packed.mark(folder, is_packed=True)


def is_packed(folder: Path) -> bool:
    """Whether all packed shards of a working folder are written."""
    return (folder / INDEX).exists()


def pack_weights(decoder: Decoder, target: Path, values: Stored = "same") -> None:
    """Write the packed shards of a plain checkpoint and their index into `target`.

    A matrix that no sparse format stores in fewer bytes stays an ordinary tensor.
    """
    linear, groups = decoder.linear_weights(), list(_groups(decoder))
    shards = [target / packed.shard_name(number, len(groups)) for number in range(1, len(groups) + 1)]
    for shard, names in zip(shards, groups, strict=True):
        found, others = {}, []
        for name in names:
            if name not in linear:
                others.append(name)
                continue
            weight = _read(decoder, name)
            matrix = weight.T if linear[name] else weight
            chosen = smallest_format(matrix, values)
            if chosen.name == "dense" and values == "same":
                others.append(name)
            else:
                found[name.removesuffix(".weight")] = chosen.pack(matrix, values)
        transposed = [name.removesuffix(".weight") for name, turned in linear.items() if turned]
        packed.write_shard(shard, found, LazyTensors(others, partial(_read, decoder)), transposed)
    packed.write_index(target, shards)


def _unpack_weights(decoder: Decoder, target: Path) -> None:
    groups = list(_groups(decoder))
    shards = [target / shard_name(number, len(groups)) for number in range(1, len(groups) + 1)]
    for shard, names in zip(shards, groups, strict=True):
        write_tensors(shard, LazyTensors(names, partial(_read, decoder)), {"format": "pt"})
    write_plain_index(target, shards)


def _groups(decoder: Decoder) -> Iterator[list[str]]:
    """Stored names, those outside the blocks first, then block by block."""
    inside = [decoder.stored_names(index) for index in range(len(decoder))]
    everywhere = set().union(*inside)
    yield [name for name in decoder.source.shapes() if name not in everywhere]
    yield from (sorted(names) for names in inside)


def _read(decoder: Decoder, name: str) -> Tensor:
    return decoder.source.read([name])[name]


def realised_sparsity(folder: Path) -> dict[str, float]:
    """Projection -> share of zeros in a finished folder; values that int8 rounds to zero are zeros too."""
    decoder, found = Decoder.open(folder), {}
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            for projection in block.projections:
                found[projection.name] = float((projection.weight == 0).sum()) / projection.weight.numel()
    return found


def _rewrite_record(folder: Path, layout: Layout, recount: bool) -> None:
    """Bring `sparity.json`, where there is one, up to the files as they are now."""
    path = folder / "sparity.json"
    if path.is_file():
        content: dict[str, Any] = read_json_object(path)
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.name != path.name)
        content |= {"layout": layout, "files": {name: file_hash(folder / name) for name in names}}
        if recount:
            content["sparsity"] = realised_sparsity(folder)
        write_json(path, content)
    CheckpointSource(folder)  # every shard is whole and every tensor is where the index says
