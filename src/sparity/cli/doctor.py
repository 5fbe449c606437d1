"""`sparity doctor`: what this installation and this machine can do."""

import importlib.util
import shutil
import tempfile
from typing import Any

import typer
from rich.table import Table

from sparity.cli import console
from sparity.cli.console import Json

EXTRAS = {"data": ("datasets", "pyarrow")}


def doctor(json: Json = False) -> None:
    """Check versions, processor, device, disk, extras and that the bundled model loads and prunes; exit 1 if not."""
    found = examine()
    if json:
        console.print_json(found)
    else:
        table = Table(show_header=False)
        for key, value in found.items():
            table.add_row(key, str(value))
        console.out.print(table)
    if found["bundled model"] != "works":
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """The findings by name."""
    from sparity.measure import machine
    from sparity.measure.format import size

    found: dict[str, Any] = machine.describe()
    found["memory"] = size(found.pop("memory_bytes"))
    found["free in temporary folder"] = size(shutil.disk_usage(tempfile.gettempdir()).free)
    for extra, packages in EXTRAS.items():
        absent = [name for name in packages if importlib.util.find_spec(name) is None]
        found[f"extra {extra}"] = f"missing: pip install 'sparity[{extra}]'" if absent else "installed"
    found["sparse kernels"] = f"{_kernels()}; packed checkpoints run on them"
    found["GPU kernels"] = _gpu_kernels()
    found["bundled model"] = _bundled_model()
    return found


def _kernels() -> str:
    from sparity.engine.kernels import native

    reason = native.unavailable()
    return f"PyTorch instead: {reason}" if reason else f"compiled, {native.instruction_set()}"


def _gpu_kernels() -> str:
    import torch

    from sparity.engine.kernels import gpu

    reason = gpu.unavailable(torch.device("cuda"))
    return f"none: {reason}" if reason else "Triton; no model runs on them yet"


def _bundled_model() -> str:
    import torch

    from sparity import zoo
    from sparity.errors import SparityError
    from sparity.models import Decoder

    try:
        decoder = Decoder.open(zoo.path("llama"))
        inputs = decoder.inputs(torch.tensor([[0, 1, 2, 3]]))
        with decoder.block(0) as block:
            hidden = inputs.hidden.clone()
            block.run(inputs, hidden, into=hidden)
        return "works" if bool(torch.isfinite(hidden).all()) else "gives numbers that are not finite"
    except SparityError as error:
        return f"does not load: {error}"
