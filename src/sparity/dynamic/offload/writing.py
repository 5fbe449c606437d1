"""A model is written so that its neurons, or its experts, can stay on disk: block by block, one in memory at a time.

config.json, tokenizer files, sparity-dynamic/    as in the model's folder
resident-00000.safetensors ...                    what is always in memory, under the names of the model in memory
units-00000.safetensors ...                       a bundle for each MLP, see `bundle`
sparity-offload.json                              what belongs together; written last
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparity.checkpoints.companions import companions, copy_files
from sparity.checkpoints.packed import runtime_of
from sparity.checkpoints.runtime_data import FOLDER, read_runtime
from sparity.checkpoints.shards import LazyTensors, write_tensors
from sparity.checkpoints.weight_files import OFFLOADED
from sparity.dynamic.offload.bundle import KEY, write_bundle
from sparity.dynamic.offload.deciding import WORDS, Kind, far_experts, far_mlps, kind_of
from sparity.dynamic.offload.folder import FORMAT
from sparity.dynamic.offload.tracing import Stages, run_traced
from sparity.engine.modules.skips import FIRST
from sparity.errors import InvalidInput, RunConflict, SparityError, wrong_input
from sparity.files import disk_errors, expand, flush_folder, make_folder, write_json
from sparity.models import Block, Decoder, InputSite
from sparity.models import transformers as hf
from sparity.models.attached_runtime import stage_of
from sparity.models.experts import DOWN, GATE_UP


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        folder: where.
        kind: what decides which units count.
        resident_bytes: always in memory.
        far_bytes: on disk.
        record_bytes: of one unit.
        at_once: units that a layer may need at once: all of its neurons, or the experts of a token.
        tokens: of calibration text that were traced.
    """

    folder: Path
    kind: Kind
    resident_bytes: int
    far_bytes: int
    record_bytes: int
    at_once: int
    tokens: int

    @property
    def least_bytes(self) -> int:
        """The least memory for weights that the model runs in."""
        return self.resident_bytes + self.at_once * self.record_bytes

    @property
    def words(self) -> str:
        """What decides, as a user reads it."""
        return WORDS[self.kind]


@wrong_input()
def offload(
    model: str | Path, output: str | Path, *, tokens: Any = None, dtype: str = "auto", force: bool = False
) -> Written:
    """Write a model whose neurons, or experts, can stay on disk; `load_offloaded` opens it.

    Args:
        model: a folder, a name or a GGUF file: of ReLUs, with an `activations` stage, or with experts.
        output: the folder to write.
        tokens: calibration ids `[samples, length]`, by which units are put into an order and memory is shared out.
        dtype: of the weights; auto = as they are stored.
        force: replace what is there.

    Raises:
        InvalidInput: nothing decides which neurons count, or the ids do not fit.
        RunConflict: the output is there.
        SparityError: the disk is full or the folder cannot be written; nothing is left behind.

    Example:
        >>> import sparity, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = sparity.offload("zoo:relu", f"{folder}/far")
        >>> written.kind, written.record_bytes
        ('output', 384)
    """
    folder, place = hf.locate(model), expand(output)
    decoder = Decoder.open(folder, dtype=dtype)
    every = [site for index in range(len(decoder)) for site in decoder.sites(index)]
    stages = _stages(decoder, every, folder)
    kind = kind_of(decoder.skeleton, every, [stage for stage, _ in stages])
    ids = None if tokens is None else _ids(tokens)
    with _taking_its_place(place, folder, force) as target:
        _check_room(decoder, target)
        return _write(decoder, folder, target, place, kind, stages, ids)


def _write(
    decoder: Decoder, folder: Path, target: Path, place: Path, kind: Kind, stages: Stages, ids: Tensor | None
) -> Written:
    bundles, resident = list[dict[str, Any]](), list[dict[str, Any]]()
    name = hashlib.sha256(f"{decoder.source.fingerprint()} {decoder.dtype} {kind}".encode()).hexdigest()
    inputs, traced, record_bytes = None if ids is None else decoder.inputs(ids), 0, 0

    def keep(tensors: Mapping[str, Tensor]) -> None:
        path = target / f"resident-{len(resident):05d}.safetensors"
        identity = {"model": name, "number": len(resident)}
        write_tensors(path, tensors, {KEY: json.dumps(identity)})
        resident.append({"file": path.name, "bytes": path.stat().st_size, "number": len(resident)})

    keep(_outside(decoder))
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            traces = [] if inputs is None else run_traced(block, inputs, inputs.hidden, stages, kind)
            far, parts = _far_parts(block, kind)
            for number, each in enumerate(parts):
                path = target / f"units-{len(bundles):05d}.safetensors"
                identity = {"model": name, "block": index, "number": number}
                trace = traces[number] if traces else None
                write_bundle(path, each, trace, identity)
                bundles.append({"file": path.name, "bytes": path.stat().st_size, "units": len(each[0]), **identity})
                record_bytes = sum(matrix.shape[1] for matrix in each) * decoder.dtype.itemsize
                traced = 0 if trace is None else len(trace)
            state = block.module.state_dict()
            keep({f"{block.name}.{key}": tensor for key, tensor in state.items() if key not in far})
    copy_files(folder, [*companions(folder), *(f"{FOLDER}/{entry.file}" for entry in runtime_of(folder))], target)
    copy_files(folder, ["config.json"], target)
    dtype = str(decoder.dtype).removeprefix("torch.")
    content = {"format": FORMAT, "kind": kind, "model": name, "dtype": dtype, "resident": resident, "bundles": bundles}
    write_json(target / OFFLOADED, content)
    units = [bundle["units"] for bundle in bundles]
    at_once = int(decoder.config.num_experts_per_tok) if kind == "experts" else max(units)
    return Written(
        place,
        kind,
        sum(each["bytes"] for each in resident),
        sum(units) * record_bytes,
        record_bytes,
        at_once,
        traced,
    )


def _stages(decoder: Decoder, sites: Sequence[InputSite], folder: Path) -> Stages:
    """The run-time stages that set activations of MLPs to zero, or skip experts, with their data."""
    found = [(stage_of(entry, folder), entry) for entry in runtime_of(folder)]
    return [(stage, read_runtime(folder, entry)) for stage, entry in found if stage.zeroes(decoder.skeleton, sites)]


def _outside(decoder: Decoder) -> LazyTensors:
    """The tensors outside the blocks, under the names of the model in memory; a tied copy is left out."""
    rest, prefix = decoder.rest(), f"{decoder.skeleton.base_model_prefix}."
    inside, found = f"{decoder.family.blocks}.", dict[str, str]()
    for name in decoder.skeleton.state_dict():
        spellings = (name, name.removeprefix(prefix), prefix + name)
        stored = None if name.startswith(inside) else next((each for each in spellings if each in rest), None)
        if stored is not None:
            found[name] = stored
    return LazyTensors(found, lambda name: rest[found[name]])


def _far_parts(block: Block, kind: Kind) -> tuple[set[str], list[list[Tensor]]]:
    """The names within a block of the parameters that go to disk, and of each MLP the parts of its units' records."""
    paths = {module: path for path, module in block.module.named_modules()}
    if kind == "experts":
        experts = far_experts(block.sites)
        names = {f"{paths[module]}.{name}" for module in experts for name in (GATE_UP, DOWN)}
        return names, [[module.get_parameter(name).data.flatten(1) for name in (GATE_UP, DOWN)] for module in experts]
    mlps = far_mlps(block.module, block.sites, kind)
    names = {f"{paths[projection.module]}.weight" for mlp in mlps for projection in (*mlp.rows, mlp.columns)}
    return names, [[*(projection.weight for projection in mlp.rows), mlp.columns.weight.T] for mlp in mlps]


def _ids(tokens: Any) -> Tensor:
    ids = torch.as_tensor(tokens)
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] <= FIRST or not len(ids):
        raise InvalidInput(
            f"calibration ids must be whole numbers [samples, length] longer than {FIRST} tokens, got {list(ids.shape)}"
        )
    return ids.long().cpu()


def _check_room(decoder: Decoder, target: Path) -> None:
    shapes = decoder.source.shapes().values()
    needed = sum(torch.Size(shape).numel() for shape in shapes) * decoder.dtype.itemsize
    free = shutil.disk_usage(target).free
    if needed > free:
        raise SparityError(
            f"{target.parent} has {free / 1e9:,.1f} GB free, and the model takes {needed / 1e9:,.1f} GB: free some "
            "space or choose another output"
        )


@contextmanager
def _taking_its_place(place: Path, model: Path, force: bool) -> Iterator[Path]:
    """A folder to write to, which becomes `place` when all is well, and else is removed."""
    if place.exists() and (not force or not place.is_dir()):
        raise RunConflict(f"{place} is there already: choose another output{', or --force' if place.is_dir() else ''}")
    if model.resolve().is_relative_to(place.resolve()):
        raise InvalidInput(f"output {place}: the model itself lies there and would be lost; choose another output")
    target = place.with_name(place.name + ".partial")
    if target.exists():
        if not force:
            raise RunConflict(f"{target} is there: another run is writing, or one was interrupted; --force begins anew")
        shutil.rmtree(target)
    make_folder(target)
    try:
        yield target
        flush_folder(target)
        if place.exists():
            shutil.rmtree(place)
        with disk_errors(place):
            target.rename(place)
            flush_folder(place.parent)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
