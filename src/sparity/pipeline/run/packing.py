"""Checkpoints from plain to packed and back: shard by shard, every tensor bit for bit."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sparity.checkpoints import packed
from sparity.checkpoints.coded_matrix import chosen_layout
from sparity.checkpoints.companions import copy_files, everything
from sparity.checkpoints.packed import INDEX
from sparity.checkpoints.recorded_scales import carry_scales, read_scales
from sparity.checkpoints.shards import LazyTensors, write_tensors
from sparity.checkpoints.source import CheckpointSource
from sparity.checkpoints.stored_as import StoredAs, stored_as
from sparity.engine.kernels.fastest import Fastest, fastest_format
from sparity.engine.kernels.smallest import smallest_format
from sparity.errors import InvalidInput, wrong_input
from sparity.files import read_json_object, write_json
from sparity.formats import Encoding, EncodingSpec, Format, Packed, build_encoding, build_format
from sparity.models import Decoder
from sparity.models import transformers as hf
from sparity.pipeline.run.export import RECORD, file_hashes, plain_shard, write_plain_index
from sparity.pipeline.run.format_choices import CHOICES, write_choices
from sparity.pipeline.run.result_folder import named_folder, refuse_to_replace
from sparity.pipeline.run.run_folder import RunFolder
from sparity.pipeline.run.runtime_files import carry_runtime
from sparity.recipe import Output
from sparity.visible import logger

log = logger(__name__)

Layout = Literal["plain", "packed"]
Prefer = Literal["memory", "speed"]
Coding = Literal["none", "huffman"]


@wrong_input()
def convert(
    source: str | Path,
    target: str | Path,
    values: EncodingSpec = "same",
    force: bool = False,
    to: Layout | None = None,
    prefer: Prefer = "memory",
    embeddings: EncodingSpec = "same",
    coding: Coding = "none",
) -> Layout:
    """Write a checkpoint in another layout, `to`: packed, or plain from packed, when that is None; it is returned.

    Every tensor comes back bit for bit, unless `values`, the encoding of packed matrices, or `embeddings`, that of the
    embedding and the head, quantises them. `prefer` is the format of each matrix of the blocks: the smallest, or the
    fastest on this machine. With a `coding` the files are smaller; it is undone where they are read.

    Raises:
        InvalidInput: no such model or encoding, an architecture that Sparity does not know, no name for the target, or
            a file in the source's folder that is a link to elsewhere.
        CorruptFile: the checkpoint is damaged.
        RunConflict: the target exists.
    """
    folder, place, encoding = hf.locate(source), named_folder(target), build_encoding(values)
    outside = build_encoding(embeddings)
    refuse_to_replace(folder, place)
    decoder = Decoder.open(folder)
    source_packed = isinstance(decoder.source, CheckpointSource) and decoder.source.packed
    source_rescued = isinstance(decoder.source, CheckpointSource) and decoder.source.rescued is not None
    to = to or ("plain" if source_packed else "packed")
    chosen = (
        f"values {encoding.name}" if not encoding.exact else None,
        f"embeddings {outside.name}" if not outside.exact else None,
        f"prefer {prefer}" if prefer != "memory" else None,
        f"coding {coding}" if coding != "none" else None,
    )
    asked = next(filter(None, chosen), None)
    if source_packed and (to == "packed" or asked):
        again = f", then pack it with {asked}" if asked else ""
        raise InvalidInput(f"{folder} is packed already: convert it to plain first{again}")
    if to == "plain" and not source_packed and not source_rescued:
        raise InvalidInput(f"{folder} is plain already: there is nothing to convert")
    if to == "plain" and asked:
        raise InvalidInput(f"{asked} is for packed matrices, and a plain checkpoint has none")
    identity = {"convert": decoder.source.fingerprint(), "to": to, "values": encoding.spec, "prefer": prefer}
    identity |= {} if outside.exact else {"embeddings": outside.spec}
    identity |= {} if coding == "none" else {"coding": coding}
    names = [name for name in everything(folder) if name != CHOICES]
    with RunFolder.open(place, identity, force, resume=True, in_one_go=True) as work:
        if work.finished:
            return to
        if to == "packed":
            pack_weights(decoder, work.path, encoding, prefer, outside, read_scales(folder), coding=coding)
        else:
            _unpack_weights(decoder, work.path)
        carry_runtime(folder, work.path)
        carry_scales(folder, work.path)
        copy_files(folder, names, work.path)
        packed.mark(work.path, to == "packed")
        _rewrite_record(work.path, to, recount=not encoding.exact)
        work.publish()
    return to


def pack_in_place(folder: Path, output: Output) -> None:
    """Turn the plain checkpoint in a run's working folder into a packed one; what was stopped half-way is finished."""
    if not is_packed(folder):
        recorded, decoder = read_scales(folder), Decoder.open(folder)
        said = (output.values, output.prefer, output.embeddings)
        pack_weights(decoder, folder, *said, recorded, output.matrices, output.coding)
    shards = set(folder.glob("sparity-*.safetensors"))
    packed.remove_other_weights(folder, shards)
    packed.mark(folder, is_packed=True)


def is_exact(output: Output) -> bool:
    """Whether the matrices of the blocks are stored bit for bit, as far as the encodings go."""
    said = (output.values, *(each.values or "same" for each in output.matrices.values()))
    return all(build_encoding(values).exact for values in said)


def is_packed(folder: Path) -> bool:
    """Whether all packed shards of a working folder are written."""
    return (folder / INDEX).exists()


def pack_weights(
    decoder: Decoder,
    target: Path,
    values: EncodingSpec = "same",
    prefer: Prefer = "memory",
    embeddings: EncodingSpec = "same",
    recorded: Mapping[str, Mapping[str, Tensor]] | None = None,
    matrices: Mapping[str, StoredAs] | None = None,
    coding: Coding = "none",
) -> None:
    """Write the packed shards of a plain checkpoint and their index into `target`; for speed, also what was chosen why.

    A matrix that no sparse format stores in fewer bytes, or multiplies faster, stays an ordinary tensor, unless the
    `coding` makes it smaller. By the scales that are `recorded` for a projection its weights are stored as they are;
    only others are rounded. `matrices` says by globs of names what is stored otherwise.
    """
    chosen, rounded, known = dict[str, Fastest](), dict[str, str](), recorded or {}
    huffman = coding == "huffman"

    def format_for(name: str, matrix: Tensor, encoding: Encoding) -> Format:
        if prefer == "memory":
            return smallest_format(matrix, encoding)
        chosen[name] = fastest_format(matrix, encoding)
        return chosen[name].format

    linear, groups = decoder.linear_weights(), list(_groups(decoder))
    outside = build_encoding(embeddings)
    vocabulary = () if outside.exact else decoder.vocabulary_weights()
    shards = [target / packed.packed_shard(number, len(groups)) for number in range(1, len(groups) + 1)]
    for shard, names in zip(shards, groups, strict=True):
        found, others = {}, []
        for name in names:
            own = name.removesuffix(".weight")
            if name in vocabulary:
                found[own] = _row_by_row(name, _read(decoder, name), outside)
                continue
            if name not in linear:
                others.append(name)
                continue
            weight = _read(decoder, name)
            matrix = weight.T if linear[name] else weight
            said = stored_as(own, matrices or {})
            asked = build_encoding(said.values or values)
            grid = asked.on_grid(matrix, known[own]) if asked.keeps_grids and own in known else None
            if known and asked.keeps_grids and grid is None:
                rounded[own] = asked.name
            try:
                encoding = grid[0] if grid else asked
                form = build_format(said.format) if said.format else format_for(name, matrix, encoding)
                if form.name == "dense" and asked.exact and not (huffman and chosen_layout(form.pack(matrix))):
                    others.append(name)
                else:
                    found[own] = _packed(form, matrix, asked, grid)
            except InvalidInput as error:
                raise InvalidInput(f"{name}: {error}") from error
        transposed = [name.removesuffix(".weight") for name, turned in linear.items() if turned]
        rest = LazyTensors(others, partial(_read, decoder))
        packed.write_shard(shard, found, rest, transposed, decoder.unused(), huffman)
    if rounded:
        log.warning(
            "%d of the matrices are not on a grid that %s can hold (%s): they were rounded anew",
            len(rounded),
            " or ".join(dict.fromkeys(rounded.values())),
            next(iter(rounded)) if len(rounded) == 1 else f"{next(iter(rounded))}, ...",
        )
    if prefer == "speed":
        write_choices(target, chosen)
    packed.write_packed_index(target, shards)


def _row_by_row(name: str, matrix: Tensor, encoding: Encoding) -> Packed:
    """A matrix of the vocabulary: an embedding reads single rows."""
    try:
        return build_format("dense").pack(matrix, encoding)
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error}") from error


def _packed(
    form: Format, matrix: Tensor, asked: Encoding, grid: tuple[Encoding, Tensor, dict[str, Tensor]] | None
) -> Packed:
    if grid is None:
        return form.pack(matrix, asked)
    encoding, stored, sides = grid
    return form.wrap(stored, sides, matrix.dtype, encoding)


def _unpack_weights(decoder: Decoder, target: Path) -> None:
    groups = list(_groups(decoder))
    shards = [target / plain_shard(number, len(groups)) for number in range(1, len(groups) + 1)]
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


def realised_zeros(folder: Path) -> dict[str, float]:
    """Projection -> share of zeros in a finished folder; values that are rounded to zero are zeros too."""
    decoder, found = Decoder.open(folder), {}
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            for projection in block.projections:
                found[projection.name] = float((projection.weight == 0).sum()) / projection.weight.numel()
    return found


def _rewrite_record(folder: Path, layout: Layout, recount: bool) -> None:
    """Bring `sparity.json`, where there is one, up to the files as they are now."""
    path = folder / RECORD
    if path.is_file():
        content: dict[str, Any] = read_json_object(path)
        content |= {"layout": layout, "files": file_hashes(folder)}
        projections = content.get("projections")
        if recount and isinstance(projections, dict):
            zeros = realised_zeros(folder)
            for name, entry in projections.items():
                entry["zeros"] = zeros[name]
        write_json(path, content)
    CheckpointSource(folder)  # every shard is whole and every tensor is where the index says
