"""`sparity demo`: the whole of it on the bundled model, without a network."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from sparity.cli import console
from sparity.cli.options import Json, Quiet

STAGES: tuple[dict[str, Any], ...] = (
    {"score": "magnitude", "sparsity": 0.5},
    {"score": "wanda", "sparsity": 0.5},
    {"solver": "sparsegpt", "sparsity": 0.5},
    {"score": "magnitude", "pattern": "2:4"},
    {"score": "wanda", "pattern": "2:4"},
    {"solver": "sparsegpt", "pattern": "2:4"},
)
SHARED: dict[str, Any] = {
    "model": "zoo:llama",
    "dtype": "bfloat16",
    "calibration": {"text": "python-docs:calibration", "documents": "joined", "samples": 64, "length": 512, "batch": 8},
    "measure": {"perplexity": ["python-docs:held-out", "python-code:held-out"], "window": 512, "windows": 32},
    "output": {"format": "packed"},
}


def demo(
    output: Annotated[str, typer.Option("--output", "-o", help="The folder for report and JSON.")] = "demo-out",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune the bundled model by magnitude, Wanda and SparseGPT, to 50 % and to 2:4, and compare them.

    It is calibrated on Python's own documentation and measured on held-out parts of it and of Python's library. The
    model is too small to gain speed from zeros, so a larger one with random weights shows speed at the end.
    """
    with console.errors_in_one_line():
        from sparity.files import make_folder, write_json, write_text
        from sparity.measure.show.page_run import render_html
        from sparity.measure.show.table import print_report
        from sparity.measure.timing.random_model import time_larger
        from sparity.pipeline.run.result_folder import named_folder
        from sparity.pipeline.run.runner import execute
        from sparity.recipe import Recipe

        place = named_folder(output)
        make_folder(place)
        reports = []
        with tempfile.TemporaryDirectory(prefix="sparity-demo-") as folder, console.ProgressBar(quiet) as progress:
            for number, stage in enumerate(STAGES):
                progress.phase(f"method {number + 1} of {len(STAGES)}")
                recipe = Recipe.read({**SHARED, "stages": [{"prune": stage}]})
                reports.append(execute(recipe, progress, output=Path(folder) / str(number)).report)
            progress.phase("timing a larger model with random weights")
            larger = time_larger()
        candidates = tuple(candidate for report in reports for candidate in report.candidates)
        report = dataclasses.replace(reports[0], candidates=candidates, larger=larger)
        write_json(place / "report.json", report.to_dict())
        write_text(place / "report.html", render_html(report))
    if json:
        console.print_json(report.to_dict())
    elif not quiet:
        print_report(report, console.out)
        console.out.print(f"page: {place / 'report.html'}", soft_wrap=True)
