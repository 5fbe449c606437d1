"""Which kernels multiply a model's weights on this machine, and why: what `sparity doctor --kernels` shows."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sparity.checkpoints.source import CheckpointSource
from sparity.engine.decoding import llama_layout
from sparity.engine.kernels import native, prepare
from sparity.engine.kernels.choice import Choice
from sparity.engine.kernels.fastest import fastest_format
from sparity.engine.kernels.prepared import case_of
from sparity.formats import Packed, build_format
from sparity.models import Decoder
from sparity.models import transformers as hf

BATCHES = (1, 4, 16, 128)


@dataclass(frozen=True)
class Alike:
    """Weights of one shape, format, type and step of density.

    Attributes:
        roles: the names of their layers, such as `q_proj`.
        count: how many they are.
        values: the type of the stored values.
        density: the share of kept values, in percent.
        formats: of a plain model, the choice that `prefer: speed` would make; else None.
        kernels: inputs per call -> what multiplies them.
    """

    roles: tuple[str, ...]
    count: int
    rows: int
    columns: int
    format: str
    values: str
    density: int
    formats: Choice | None
    kernels: dict[int, Choice]


@dataclass(frozen=True)
class Kernels:
    """The findings.

    Attributes:
        unavailable: why there are no compiled kernels, or None.
        decoding: why the model does not decode on the engine's fast path, or None when it does.
    """

    model: str
    layout: str
    threads: int
    unavailable: str | None
    decoding: str | None
    weights: tuple[Alike, ...]


def examine_kernels(model: str | Path) -> Kernels:
    """What multiplies each linear layer's weight of a model, packed or plain; timed where it was not before.

    A plain model is looked at as `prefer: speed` would pack it.

    Raises:
        InvalidInput: no such model, or an architecture that Sparity does not know.
        CorruptFile: the checkpoint is damaged.
    """
    folder = hf.locate(model)
    decoder = Decoder.open(folder)
    packed = isinstance(decoder.source, CheckpointSource) and decoder.source.packed
    found: dict[tuple[object, ...], Alike] = {}
    for name, matrix, formats in _matrices(decoder, packed):
        case = case_of(matrix, 1, native.threads())
        key, role = (case, formats), name.removesuffix(".weight").rpartition(".")[2]
        if key in found:
            alike = found[key]
            found[key] = replace(alike, count=alike.count + 1, roles=tuple(dict.fromkeys((*alike.roles, role))))
            continue
        prepared = prepare(matrix)
        kernels = {batch: prepared.choice(batch) for batch in BATCHES}
        found[key] = Alike(
            (role,), 1, case.rows, case.columns, case.format, case.values, case.density, formats, kernels
        )
    layout = "packed" if packed else "plain"
    decoding = _decoding_declines(decoder)
    return Kernels(str(model), layout, native.threads(), native.unavailable(), decoding, tuple(found.values()))


def _decoding_declines(decoder: Decoder) -> str | None:
    """Why the engine does not decode a model on its fast path, as far as it can be seen without its weights."""
    if decoder.dtype != torch.bfloat16:
        return f"the engine runs models in bfloat16, not {str(decoder.dtype).removeprefix('torch.')}"
    return llama_layout.outline_declines(decoder.skeleton.base_model)


def _matrices(decoder: Decoder, packed: bool) -> Iterator[tuple[str, Packed, Choice | None]]:
    """Name, matrix and, where it would still be chosen, the choice of its format; one matrix at a time."""
    held = decoder.source.matrices if isinstance(decoder.source, CheckpointSource) else {}
    for name, transposed in decoder.linear_weights().items():
        if name in held:
            yield name, held[name].packed(), None
            continue
        stored: Tensor = decoder.source.read([name])[name]
        weight = stored.T.contiguous() if transposed else stored
        if packed:
            yield name, build_format("dense").pack(weight), None
        else:
            found = fastest_format(weight)
            yield name, found.format.pack(weight), found.choice
