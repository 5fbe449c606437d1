"""`sparity demo`: the whole of it, on a real chat model where that was fetched, else on the bundled one."""

import contextlib
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
    "dtype": "bfloat16",  # whose products are float32 ones where the processor emulates bfloat16
    "calibration": {"text": "python-docs:calibration", "documents": "joined", "samples": 8, "length": 512, "batch": 4},
    "measure": {"perplexity": ["python-docs:held-out"], "window": 512, "windows": 4, "speed": None},
    "output": {"format": "packed"},
}
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about a lighthouse in a storm.",
    "Why does ice float on water?",
)


def demo(
    output: Annotated[str, typer.Option("--output", "-o", help="The folder for report and JSON.")] = "demo-out",
    bundled: Annotated[bool, typer.Option("--bundled", help="On the bundled model, whatever was fetched.")] = False,
    llama_python: Annotated[
        str | None, typer.Option("--llama-python", help="A Python that has llama-cpp-python; else this one if it has.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model in several ways and compare what that did to its quality, size and speed.

    Where zoo:smollm2 was fetched (sparity fetch smollm2) it is that chat model: magnitude and SparseGPT at 50 %, and
    SparseGPT 2:4; at the end all models, and llama.cpp with the dense weights where llama-cpp-python is installed,
    decode in turns and answer the same questions. Else it is the bundled one: magnitude, Wanda and SparseGPT, to 50 %
    and to 2:4. It is too small to gain speed from zeros, so a larger one with random weights shows speed. Calibrated on
    Python's own documentation, measured on held-out parts of it.
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
            report = _compare(Path(folder), progress, real, llama_python)
        write_json(place / "report.json", report.to_dict())
        write_text(place / "report.html", render_html(report))
    if json:
        console.print_json(report.to_dict())
    elif not quiet:
        print_report(report, console.out)
        _print_contestants(report)
        console.out.print(f"page: {place / 'report.html'}", soft_wrap=True)


def _compare(folder: Path, progress: console.ProgressBar, real: bool, llama_python: str | None) -> "Report":
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
        return _with_contestants(report, results, folder, llama_python)
    progress.phase("timing a larger model with random weights")
    return dataclasses.replace(report, larger=time_larger())


def _with_contestants(report: "Report", results: "list[Result]", folder: Path, llama_python: str | None) -> "Report":
    from sparity.measure.peers.entrants import llama_entrants
    from sparity.measure.peers.llama import Llama, find_python
    from sparity.measure.timing.showdown import our_entrants, showdown
    from sparity.models import transformers as hf
    from sparity.models.loading import load_tokenizer
    from sparity.pipeline.run.tokens import measured_texts
    from sparity.quality.perplexity import split_windows
    from sparity.recipe import Recipe

    pruned = {
        candidate.name: (result.path, candidate.quality[0].perplexity)
        for result, candidate in zip(results, report.candidates, strict=True)
    }
    dense = hf.locate(REAL_SHARED["model"])
    tokenizer = load_tokenizer(dense)
    entrants = list(our_entrants((dense, report.candidates[0].quality[0].dense_perplexity), pruned, tokenizer))
    python = find_python(llama_python)
    with Llama(python) if python else contextlib.nullcontext() as llama:
        if llama is not None:
            outline = hf.outline_model(hf.read_config(dense))
            recipe = Recipe.read({**REAL_SHARED, "stages": [{"prune": REAL_STAGES[0]}]})
            (text,) = measured_texts(recipe.measure, tokenizer, outline)
            windows = split_windows(outline, text.ids, text.window)
            entrants += llama_entrants(llama, dense, folder, windows, tokenizer)
        return dataclasses.replace(report, contestants=showdown(entrants, tokenizer, PROMPTS))


def _print_contestants(report: "Report") -> None:
    """Speed and quality in a line each, and three answers."""
    from sparity.measure.charts.tradeoff import dominated
    from sparity.measure.show import numbers
    from sparity.measure.show.sentences import describe_answer

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
                console.out.print(f"  {one.name}: {describe_answer(one.answers[prompt])}", soft_wrap=True)
