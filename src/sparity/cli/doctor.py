"""`sparity doctor`: what this installation and this machine can do, and which kernels a model runs on."""

import dataclasses
import importlib.util
import shutil
import tempfile
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparity.cli import console
from sparity.cli.options import Json

if TYPE_CHECKING:
    from sparity.engine.kernels.choice import Choice
    from sparity.pipeline.studies.kernel_survey import Alike

EXTRAS = {"data": ("datasets", "pyarrow")}


def doctor(
    kernels: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Show which kernels multiply this model's weights, and why.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check versions, processor, device, disk, extras and that the bundled model loads and prunes; exit 1 if not.

    With --kernels MODEL: for each kind of weight in a packed model, what multiplies it at several batch sizes, how
    fast, and why the others lost; for a plain model, as it would be packed for speed; and whether the model decodes on
    the engine's fast path, or why not. Exit code 1 when there is no such model.
    """
    if kernels is not None:
        _kernels_of(kernels, json)
        return
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


def _kernels_of(model: str, json: bool) -> None:
    with console.errors_in_one_line():
        from sparity.pipeline.studies.kernel_survey import examine_kernels

        found = examine_kernels(model)
    if json:
        console.print_json(dataclasses.asdict(found))
        return
    console.out.print(f"{found.model}: {found.layout}, {found.threads} threads", soft_wrap=True)
    for alike in found.weights:
        console.out.print(_kernel_table(alike))
    if found.unavailable:
        console.out.print(f"no compiled kernels: {found.unavailable}", soft_wrap=True)
    elif found.decoding:
        console.out.print(f"decodes by transformers' own code: {found.decoding}", soft_wrap=True)
    else:
        console.out.print("decodes on the engine's fast path")


def _kernel_table(alike: "Alike") -> Table:
    weights = f"{alike.count} of {alike.rows} x {alike.columns} ({', '.join(alike.roles)})"
    title = f"{weights}: {alike.format}, {alike.values}, {alike.density} % kept"
    table = Table("inputs", "winner", "candidates: time per call, why not", title=title, title_justify="left")
    if alike.formats is not None:
        table.add_row("format, 1", alike.formats.winner, _candidates(alike.formats))
    for batch, choice in alike.kernels.items():
        table.add_row(str(batch), choice.winner, _candidates(choice))
    return table


def _candidates(choice: "Choice") -> str:
    lines = [] if choice.timed else [choice.how]
    for candidate in choice.candidates:
        time = None if candidate.seconds is None else f"{candidate.seconds * 1e6:,.0f} us"
        said = ", ".join(filter(None, (time, candidate.lost)))
        if said:
            lines.append(f"{candidate.name}: {said}")
    return "\n".join(lines)


def examine() -> dict[str, Any]:
    """The findings by name."""
    from sparity.engine.kernels import openmp
    from sparity.measure.data import machine
    from sparity.measure.show.numbers import size

    found: dict[str, Any] = machine.describe()
    found["memory"] = size(found.pop("memory_bytes"))
    found["bfloat16 products"] = found.pop("bfloat16_products")
    found["free in temporary folder"] = size(shutil.disk_usage(tempfile.gettempdir()).free)
    for extra, packages in EXTRAS.items():
        absent = [name for name in packages if importlib.util.find_spec(name) is None]
        found[f"extra {extra}"] = f"missing: pip install 'sparity[{extra}]'" if absent else "installed"
    found["sparse kernels"] = f"{_kernels()}; packed checkpoints run on them"
    found["GPU kernels"] = _gpu_kernels()
    found["OpenMP"] = openmp.words(openmp.loaded())
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
