"""Open a model whose neurons, or experts, are on disk, within a limit of memory that is kept."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparity.checkpoints.packed import runtime_of
from sparity.dynamic.offload.arena import Arena
from sparity.dynamic.offload.bound import Bound, Speeds, bound_of, disk_speeds, gap_of
from sparity.dynamic.offload.bundle import AGAIN, Bundle
from sparity.dynamic.offload.deciding import Kind, far_experts, far_mlps
from sparity.dynamic.offload.experts import FarExperts
from sparity.dynamic.offload.far_layer import FarLayer
from sparity.dynamic.offload.fixed import Fixed, refuse
from sparity.dynamic.offload.folder import open_bundles, read_manifest, resident_model
from sparity.dynamic.offload.layout import Layout, Place, lay_out
from sparity.dynamic.offload.lookahead import Lookahead, guess_of, guess_of_router
from sparity.dynamic.offload.modules import FarColumns, FarRows, Note
from sparity.dynamic.offload.placement import Costs
from sparity.dynamic.offload.reading import Counts, Reader
from sparity.errors import CorruptFile, InvalidInput, wrong_input
from sparity.files import expand
from sparity.memory import as_bytes
from sparity.models.attached_runtime import attach_runtime, input_sites

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the memory for units, that hot ones may get
ATTRIBUTE = "sparity_offload"
NEAR = 1e10  # bytes per second that memory gives to products, about; what the programme weighs the disk against


@dataclass(frozen=True)
class Offloaded(Fixed):
    """What an offloaded model holds and does; the attribute `sparity_offload` of the model.

    Attributes:
        kind: what decides which units count.
        resident_bytes: of the weights that are always in memory, but for units.
        arena_bytes: of the memory for units.
        far_bytes: of all units, on disk.
        layout: how that memory is shared out.
        bound: what a token must wait for, counted on calibration text that the layout was not chosen by.
        counts: what tokens needed and what was read since the model was opened.
        layers: of units.
    """

    kind: Kind
    resident_bytes: int
    arena_bytes: int
    far_bytes: int
    layout: Layout
    bound: Bound
    counts: Counts
    layers: tuple[FarLayer, ...]
    pools: tuple[ThreadPoolExecutor, ...]

    @property
    def units(self) -> int:
        """Of all layers."""
        return sum(layer.slots.units for layer in self.layers)

    @property
    def memory_bytes(self) -> int:
        """Of all weights that are in memory."""
        return self.resident_bytes + self.arena_bytes

    def close(self) -> None:
        """Close the files and end the threads; the model cannot be called any more."""
        for layer in self.layers:
            layer.close()
        for pool in self.pools:
            pool.shutdown()


@wrong_input()
def load_offloaded(
    folder: str | Path,
    memory: int | str,
    *,
    hot: float | None = None,
    place: Place = "frequency",
    window: int | None = None,
    threads: int = 8,
    ahead: bool | None = None,
) -> Any:
    """A transformers model whose weights take no more than `memory`; the rest is read from disk when a token needs it.

    Args:
        folder: what `offload` wrote.
        memory: of all weights in memory together, in bytes or such as "1.5GB". Python, PyTorch, activations and the
            key-value cache come on top.
        hot: the share of the memory for units that the most frequent ones always have; None = what missed the least on
            calibration text.
        place: how hot units are chosen: the most frequent ones, or by a mixed-integer programme that weighs times.
        window: let go of units that the last so many tokens did not need; None = keep them while there is room.
        threads: that read.
        ahead: read what the next layer is expected to need while a layer computes; None = where a processor is idle.

    Raises:
        CorruptFile: a file is missing, truncated, or another model's.
        InvalidInput: the memory does not suffice, or no such folder.

    Example:
        >>> import sparity, tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = sparity.offload("zoo:relu", f"{folder}/far")
        ...     model = sparity.load_offloaded(written.folder, "8MB")
        ...     logits = model(torch.arange(8)[None]).logits
        ...     model.sparity_offload.close()
        >>> logits.shape, model.sparity_offload.memory_bytes <= 8_000_000
        (torch.Size([1, 8, 8192]), True)
    """
    path, limit = expand(folder), as_bytes(memory)
    if (hot is not None and not 0 <= hot <= 1) or threads < 1 or (window is not None and window < 1):
        raise InvalidInput(f"hot {hot} must lie between 0 and 1, threads {threads} and window {window} be 1 or more")
    manifest = read_manifest(path)
    bundles, model = open_bundles(path, manifest), resident_model(path, manifest)
    kind: Kind = manifest["kind"]
    resident = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta)
    record, most = bundles[0].record_bytes, max(bundle.units for bundle in bundles)
    at_once = min(int(model.config.num_experts_per_tok), most) if kind == "experts" else most
    needed = resident + at_once * record
    if limit < needed:
        raise InvalidInput(
            f"memory {limit / 1e6:,.1f} MB does not suffice for {path}: what is always in memory takes "
            f"{resident / 1e6:,.1f} MB, and {at_once:,} units that are needed at once take "
            f"{at_once * record / 1e6:,.1f} MB: give {needed / 1e6:,.1f} MB or more"
        )
    reading = ThreadPoolExecutor(threads, "sparity-read")
    speeds = disk_speeds(bundles, reading, threads)
    slots = min((limit - resident) // record, sum(bundle.units for bundle in bundles))
    layout, bound = _laid_out(bundles, slots, at_once, hot, place, window, speeds)
    arena, counts = Arena(layout.slots, bundles[0].widths, bundles[0].dtype), Counts()
    layers = [
        FarLayer(slots_, arena, Reader(bundle, reading, threads, counts, gap_of(speeds)), counts)
        for bundle, slots_ in zip(bundles, layout.slots_of([b.units for b in bundles], window), strict=True)
    ]
    for layer in layers:
        layer.fill_hot()
    foreseeing = ThreadPoolExecutor(1, "sparity-ahead")
    places = _put_in(model, layers, kind, at_once, path)
    attach_runtime(model, path, runtime_of(path))
    spare = _processors() > torch.get_num_threads() if ahead is None else ahead
    _watch(model, layers, kind, places, foreseeing if spare else None)
    counts.bytes = counts.calls = 0  # of tokens
    far = sum(bundle.units * record for bundle in bundles)
    held = Offloaded(kind, resident, arena.nbytes, far, layout, bound, counts, tuple(layers), (foreseeing, reading))
    setattr(model, ATTRIBUTE, held)
    model.save_pretrained = refuse
    return model


def _laid_out(
    bundles: Sequence[Bundle], slots: int, at_once: int, hot: float | None, place: Place, window: int | None,
    speeds: Speeds,
) -> tuple[Layout, Bound]:  # fmt: skip
    """The layout, and its bound: shares are compared on the second half of the calibration text, by the first."""
    record, half = bundles[0].record_bytes, min(len(bundle.trace) for bundle in bundles) // 2
    costs = Costs(record / NEAR, record / speeds[0]) if place == "programme" else None
    every = [bundle.frequency for bundle in bundles]
    if not half:
        layout = lay_out(every, slots, at_once, 0.0 if hot is None else hot, costs)
        return layout, bound_of(bundles, layout, window, speeds)
    first = [bundle.trace[:half].mean(0) for bundle in bundles]
    bounds = {}
    for share in SHARES if hot is None else (hot,):
        tried = lay_out(first, slots, at_once, share, costs)
        bounds[share] = bound_of(bundles, tried, window, speeds, half)
    best = min(bounds, key=lambda share: bounds[share].missed_bytes)
    return lay_out(every, slots, at_once, best, costs), bounds[best]


def _put_in(model: Any, layers: Sequence[FarLayer], kind: Kind, at_once: int, path: Path) -> list[nn.Module]:
    """Modules in place of those whose weights are on disk; what each layer of experts is called by."""
    sites = input_sites(model)
    homes = {module: name for name, module in model.named_modules()}
    callers = list[nn.Module]()
    if kind == "experts":
        modules = far_experts(sites)
        _check_layers(len(modules), layers, path)
        for layer, experts in zip(layers, modules, strict=True):
            _, hidden, inner = experts.get_parameter("down_proj").shape
            _check_units(layer, experts.get_parameter("down_proj").shape[0], path)
            stand_in = FarExperts(layer, experts, inner, hidden)
            stand_in.at_once = at_once
            _replace(model, homes[experts], stand_in)
            callers.append(model.get_submodule(homes[experts].rpartition(".")[0]))
    else:
        mlps = far_mlps(model, sites, kind)
        _check_layers(len(mlps), layers, path)
        for layer, mlp in zip(layers, mlps, strict=True):
            _check_units(layer, mlp.units, path)
            for part, projection in enumerate(mlp.rows):
                rows = FarRows(layer, part, projection.module, begins=not part)
                _replace(model, homes[projection.module], rows)
            columns = FarColumns(layer, len(mlp.rows), mlp.columns.module, begins=not mlp.rows)
            _replace(model, homes[mlp.columns.module], columns)
    if without := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise CorruptFile(f"{path} lacks {len(without)} tensors of the model, {without[0]} among them; {AGAIN}")
    return callers


def _watch(
    model: Any, layers: Sequence[FarLayer], kind: Kind, callers: Sequence[Any], foreseeing: ThreadPoolExecutor | None
) -> None:
    """Hooks behind those of the run-time stages: what a gate gave, and what the next layer will need."""
    if kind == "experts":
        readers, guesses = list(callers), [guess_of_router(caller.gate) for caller in callers]
    else:
        mlps = far_mlps(model, input_sites(model), kind)
        readers = [mlp.place.reads[0].module for mlp in mlps]
        guesses = [guess_of(mlp.place, kind) for mlp in mlps]
        for mlp in mlps:
            noted: Any = mlp.place.reads[-1].module  # up
            if len(mlp.place.reads) == 2 and isinstance(noted, FarRows):
                note = Note()
                mlp.place.module.register_forward_hook(note)
                noted.names = note.take
    if foreseeing is not None:
        for reader, layer, guess in zip(readers[:-1], layers[1:], guesses[1:], strict=True):
            reader.register_forward_pre_hook(Lookahead(layer, guess, foreseeing))


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _check_layers(found: int, layers: Sequence[FarLayer], path: Path) -> None:
    if found != len(layers):
        raise CorruptFile(
            f"{path}: config.json has {found} MLPs for units on disk, which {len(layers)} files hold; {AGAIN}"
        )


def _check_units(layer: FarLayer, units: int, path: Path) -> None:
    if layer.slots.units != units:
        raise CorruptFile(f"{path}: an MLP has {units} units by config.json and {layer.slots.units} on disk; {AGAIN}")
