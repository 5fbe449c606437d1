"""`sparity demo`: the whole of it, on a real chat model where that was fetched, else on the bundled one."""

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparity.cli import console
from sparity.cli.options import Json, Quiet

if TYPE_CHECKING:
    from sparity.measure.data.report import Report
    from sparity.pipeline.run.runner import Result

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
REAL = "smollm2"
REAL_STAGES: tuple[dict[str, Any], ...] = (
    {"score": "magnitude", "sparsity": 0.5},
    {"solver": "sparsegpt", "sparsity": 0.5},
    {"solver": "sparsegpt", "pattern": "2:4"},
)
REAL_SHARED: dict[str, Any] = {
    "model": f"zoo:{REAL}",
    "dtype": "float32",  # where the processor has no bfloat16 arithmetic, its forward passes take ten times as long
    "calibration": {"text": "python-docs:calibration", "documents": "joined", "samples": 8, "length": 512, "batch": 4},
    "measure": {"perplexity": ["python-docs:held-out"], "window": 512, "windows": 4, "speed": None},
}
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about a lighthouse in a storm.",
    "Why does ice float on water?",
)


def demo(
    output: Annotated[str, typer.Option("--output", "-o", help="The folder for report and JSON.")] = "demo-out",
    bundled: Annotated[bool, typer.Option("--bundled", help="On the bundled model, whatever was fetched.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model in several ways and compare what that did to its quality, size and speed.

    Where zoo:smollm2 was fetched (sparity fetch smollm2) it is that chat model: magnitude and SparseGPT at 50 %, and
    SparseGPT 2:4; at the end all models decode in turns and answer the same questions. Else it is the bundled one:
    magnitude, Wanda and SparseGPT, to 50 % and to 2:4. It is too small to gain speed from zeros, so a larger one with
    random weights shows speed. Calibrated on Python's own documentation, measured on held-out parts of it.
    """
    with console.errors_in_one_line():
        from sparity.files import make_folder, write_json, write_text
        from sparity.measure.show.page_run import render_html
        from sparity.measure.show.table import print_report
        from sparity.models import fetched
        from sparity.pipeline.run.result_folder import named_folder

        place = named_folder(output)
        make_folder(place)
        real = not bundled and fetched.is_fetched(REAL)
        if not (real or bundled or quiet):
            console.err.print(
                f"zoo:{REAL} is not here (sparity fetch {REAL}): this is the bundled model, which is tiny",
                soft_wrap=True,
            )
        with tempfile.TemporaryDirectory(prefix="sparity-demo-") as folder, console.ProgressBar(quiet) as progress:
            report = _compare(Path(folder), progress, real)
        write_json(place / "report.json", report.to_dict())
        write_text(place / "report.html", render_html(report))
    if json:
        console.print_json(report.to_dict())
    elif not quiet:
        print_report(report, console.out)
        _print_contestants(report)
        console.out.print(f"page: {place / 'report.html'}", soft_wrap=True)


def _compare(folder: Path, progress: console.ProgressBar, real: bool) -> "Report":
    """One report of all ways of pruning, with the speed of what can show it."""
    from sparity.measure.timing.random_model import time_larger
    from sparity.pipeline.run.runner import execute
    from sparity.recipe import Recipe

    shared, stages = (REAL_SHARED, REAL_STAGES) if real else (SHARED, STAGES)
    results = []
    for number, stage in enumerate(stages):
        progress.phase(f"method {number + 1} of {len(stages)}")
        recipe = Recipe.read({**shared, "stages": [{"prune": stage}]})
        results.append(execute(recipe, progress, output=folder / str(number)))
    candidates = tuple(candidate for result in results for candidate in result.report.candidates)
    report = dataclasses.replace(results[0].report, candidates=candidates)
    if real:
        progress.phase("all models in turns, and what they answer")
        return _with_contestants(report, results, shared["model"])
    progress.phase("timing a larger model with random weights")
    return dataclasses.replace(report, larger=time_larger())


def _with_contestants(report: "Report", results: "list[Result]", model: str) -> "Report":
    from sparity.measure.timing.showdown import showdown
    from sparity.models import transformers as hf

    pruned = {
        candidate.name: (result.path, candidate.quality[0].perplexity)
        for result, candidate in zip(results, report.candidates, strict=True)
    }
    dense = hf.locate(model), report.candidates[0].quality[0].dense_perplexity
    return dataclasses.replace(report, contestants=showdown(dense, pruned, PROMPTS))


def _print_contestants(report: "Report") -> None:
    """Speed and quality in a line each, and three answers."""
    from sparity.measure.charts.tradeoff import dominated
    from sparity.measure.show import numbers

    beaten = dominated(report.contestants)
    for one in report.contestants:
        size, rate = numbers.size(one.weight_bytes), numbers.spread(one.rate, numbers.rate)
        note = f", beaten by {beaten[one.name]}" if one.name in beaten else ""
        said = f"{rate} tokens/s, {size} in memory, perplexity {numbers.perplexity(one.perplexity)}{note}"
        console.out.print(f"{one.name}: {said}", soft_wrap=True)
    for prompt in dict.fromkeys(prompt for one in report.contestants for prompt in one.answers):
        console.out.print(f"\n{prompt}", soft_wrap=True)
        for one in report.contestants:
            if prompt in one.answers:
                console.out.print(f"  {one.name}: {one.answers[prompt]}", soft_wrap=True)
