"""Which matrices of a packed checkpoint a layer of vLLM stands for: its own one, or those that it fuses."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from sparity import registry
from sparity.checkpoints.coded_matrix import piece_names
from sparity.checkpoints.packed_file import CODED, encoding_of
from sparity.checkpoints.source import CheckpointSource
from sparity.errors import CorruptFile, InvalidInput
from sparity.formats import Format, Packed, build_format

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # of most families
OPEN = 4  # checkpoints whose headers are kept


@lru_cache(OPEN)
def opened(folder: Path) -> CheckpointSource:
    """A checkpoint's headers, read once in a process."""
    return CheckpointSource(folder)


def names_of(source: CheckpointSource, prefix: str, fused: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The matrices of the layer `prefix`, in the order of its outputs; empty where the checkpoint has none of them.

    Args:
        source: the checkpoint.
        prefix: the layer's name in vLLM, such as `model.layers.0.self_attn.qkv_proj`.
        fused: last part of a name -> those that lie in its place, as the model says; those of `FUSED` otherwise.
    """
    owner, _, leaf = prefix.rpartition(".")
    stored = source.shapes()
    apart = fused.get(leaf) or FUSED.get(leaf) or ()
    for names in ((prefix,), tuple(f"{owner}.{part}" for part in apart)):
        if names and all(f"{name}.weight" in stored for name in names):
            return names
    return ()


def is_packed(source: CheckpointSource, names: Sequence[str]) -> bool:
    """Whether any of them is packed; the others are ordinary tensors."""
    return any(f"{name}.weight" in source.matrices for name in names)


def parts_of(source: CheckpointSource, names: Sequence[str]) -> dict[str, torch.dtype]:
    """The last parts of the names of their tensors, with types: `masks`, `values`, ...; `weight` of an ordinary one.

    Of a matrix under a Huffman code they are the pieces of its layout; they only make room for names.
    """
    parts: dict[str, torch.dtype] = {}
    for name in names:
        stored = f"{name}.weight"
        matrix = source.matrices.get(stored)
        if matrix is None:
            parts["weight"] = source.dtypes()[stored]
            continue
        form: Format = registry.create("format", matrix.entry["format"], matrix.entry["options"])
        encoding, (rows, columns) = encoding_of(matrix.entry), matrix.entry["shape"]
        if CODED in matrix.entry:
            parts |= dict.fromkeys(piece_names(matrix.entry[CODED]["layout"]), torch.uint8)
        else:
            layout = form.layout(rows, columns, encoding.stored(matrix.dtype))
            parts |= {part: dtype for part, (dtype, _) in layout.items()}
        parts |= {part: dtype for part, (dtype, _) in encoding.side_tensors(rows, columns).items()}
    return parts


def check_shapes(source: CheckpointSource, names: Sequence[str], outputs: Sequence[int], inputs: int) -> None:
    """Raise `CorruptFile` unless the matrices together are `[sum of outputs, inputs]`, each with its own rows."""
    stored, rows = source.shapes(), []
    for name in names:
        shape = stored[f"{name}.weight"]
        matrix = source.matrices.get(f"{name}.weight")
        if matrix is not None and matrix.transposed:
            raise InvalidInput(f"{source.folder}: {name} is stored as [in, out], which is not read in vLLM")
        if len(shape) != 2 or shape[1] != inputs:
            raise CorruptFile(f"{source.folder}: {name} is {list(shape)}, the model's has {inputs} inputs")
        rows.append(shape[0])
    if sum(rows) != sum(outputs) or (len(rows) == len(outputs) and rows != list(outputs)):
        raise CorruptFile(f"{source.folder}: {', '.join(names)} have {rows} outputs, the model's {list(outputs)}")


def read(source: CheckpointSource, names: Sequence[str]) -> Iterator[Packed]:
    """Each matrix, its hashes checked; an ordinary tensor in the format `dense`.

    Raises:
        CorruptFile: altered, or contents that contradict each other.
    """
    for name in names:
        stored = f"{name}.weight"
        matrix = source.matrices.get(stored)
        yield build_format("dense").pack(source.read([stored])[stored]) if matrix is None else matrix.packed()
