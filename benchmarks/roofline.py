"""The times that `sparity plan --roofline` gives for this machine, against measured ones: 50 cases.

    python benchmarks/roofline.py FOLDER OUT.json [--models zoo:llama,zoo:smollm2] [--tokens 32] [--rounds 5]
        [--threads 1]

Each model is pruned by each recipe into FOLDER, unless that is done, and packed. Planned and measured are, of the dense
model on the engine and of each result, the seconds of a decoding step and of a prompt: at batch 1 behind 128 tokens, at
batch 4 behind 128, and a prompt of 512 alone. A measured decoding step is the median of `sparity bench`'s protocol, a
measured prompt the time to the first token. Planned times are bounds, of a machine without overheads: `ratio` is
measured over planned, and `within` says how many cases are within 10 %. To be run on an idle machine.
"""

import argparse
import dataclasses
import re
import statistics
import sys
from pathlib import Path

import torch

from sparity.cli.console import ProgressBar
from sparity.engine.attach import attach
from sparity.files import write_json
from sparity.measure.data.machine import describe
from sparity.measure.data.roofline import roof
from sparity.measure.timing.speed import compare_speed
from sparity.models.loading import load, load_tokenizer
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import plan
from sparity.pipeline.run.roofline import shape_of, this_machine
from sparity.pipeline.run.runner import execute
from sparity.pipeline.run.tokens import calibration_tokens
from sparity.recipe import Recipe

STAGES = {
    "50 %": {"prune": {"score": "magnitude", "sparsity": 0.5}},
    "70 %": {"prune": {"score": "magnitude", "sparsity": 0.7}},
    "2:4": {"prune": {"score": "magnitude", "pattern": "2:4"}},
    "teal": {"activations": {"method": "teal", "sparsity": 0.5}},
}
SETTINGS = ((128, 1, ("decode", "prompt")), (128, 4, ("decode", "prompt")), (512, 1, ("prompt",)))
CLOSE = 0.1
COLUMNS = ("model", "form", "phase", "prompt", "batch")


def recipe_of(model, stage):
    """The recipe of a stage, packed, with nothing to measure but one window."""
    text = "python-docs:held-out"
    return Recipe.read(
        {
            "model": model,
            "calibration": {"text": "python-docs:calibration", "documents": "joined", "samples": 8, "length": 256},
            "stages": [stage],
            "measure": {"perplexity": [text], "window": 256, "windows": 1, "speed": None},
            "output": {"format": "packed"},
        }
    )


def measured(model, name, folder, hardware, options):
    """Of one recipe and each setting, what is planned and the speeds of both models: [(roof, speed)]."""
    recipe = recipe_of(model, STAGES[name])
    job = prepare(recipe, None, "cpu")
    shape = shape_of(job, plan(job))
    if not folder.exists():
        with ProgressBar(quiet=False) as progress:
            execute(recipe, progress, output=folder, resume=True)
    ids = calibration_tokens(recipe.calibration, load_tokenizer(model), job.decoder.config).flatten()
    dense, sparse = load(model, dtype="bfloat16"), attach(load(folder, dtype="bfloat16"))
    return [
        (
            roof(shape, hardware, prompt, batch),
            compare_speed(dense, sparse, ids, prompt, options.tokens, options.rounds, batch),
        )
        for prompt, batch, _ in SETTINGS
    ]


def cases(model, name, found, dense):
    """The rows of one recipe's result, and those of the dense model before them if they are wanted."""
    rows = []
    for (prompt, batch, phases), (planned, speed) in zip(SETTINGS, found, strict=True):
        forms = [(name, planned.sparse, speed.sparse)]
        if dense:
            forms.insert(0, ("dense", planned.dense, speed.engine_dense.pace))
        for form, (decode, prefill), pace in forms:
            seconds = {
                "decode": (decode.seconds, batch / pace.decode.median),
                "prompt": (prefill.seconds, pace.first_token.median),
            }
            for phase in phases:
                least, taken = seconds[phase]
                case = dict(zip(COLUMNS, (model, form, phase, prompt, batch), strict=True))
                rows.append({**case, "planned": least, "measured": taken, "ratio": taken / least})
    return rows


def summary(rows):
    """How near planned and measured times are, of all cases and of each phase."""

    def told(some):
        ratios = [row["ratio"] for row in some]
        close = sum(abs(ratio - 1) <= CLOSE for ratio in ratios)
        return {
            "cases": len(some),
            "within": close,
            "ratio": {"low": min(ratios), "median": statistics.median(ratios), "high": max(ratios)},
        }

    phases = {row["phase"] for row in rows}
    return {"all": told(rows), **{phase: told([row for row in rows if row["phase"] == phase]) for phase in phases}}


def table(rows):
    """The rows as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} | planned, ms | measured, ms | ratio |", "|---" * 8 + "|"]
    for row in rows:
        times = f"{row['planned'] * 1e3:.2f} | {row['measured'] * 1e3:.2f} | {row['ratio']:.2f}"
        lines.append(
            f"| {row['model']} | {row['form']} | {row['phase']} | {row['prompt']} | {row['batch']} | {times} |"
        )
    return "\n".join(lines)


def main():
    """Prune, plan, measure, and write JSON; a table is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default="zoo:llama,zoo:smollm2")
    for name, default in (("tokens", 32), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    hardware, rows = this_machine(), []
    for model in options.models.split(","):
        for name in STAGES:
            folder = options.folder / re.sub(r"\W+", "-", f"{model} {name}").strip("-")
            found = measured(model, name, folder, hardware, options)
            rows += cases(model, name, found, dense=name == next(iter(STAGES)))
    write_json(
        options.out,
        {
            "command": " ".join(["python", "benchmarks/roofline.py", *sys.argv[1:]]),
            "machine": describe(),
            "hardware": dataclasses.asdict(hardware),
            "summary": summary(rows),
            "cases": rows,
        },
    )
    print(table(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
