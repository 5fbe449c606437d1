"""A study whose rows are recipes: each is run, measured beside the dense model, and written when it is finished."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import sparity
from sparity.files import read_json_object, write_json
from sparity.measure.data.machine import describe
from sparity.measure.data.report import plain
from sparity.recipe import Recipe


def recipe_of(model, stages, options):
    """A row's recipe."""
    return Recipe.read(
        {
            "model": model,
            "dtype": "float32",
            "calibration": {
                "text": options.calibration,
                "documents": "joined",
                "samples": options.samples,
                "length": options.length,
                "batch": 4,
            },
            "stages": stages,
            "measure": {
                "perplexity": [options.text],
                "window": options.window,
                "windows": options.windows,
                "speed": None,
            },
        }
    )


def run(rows, known, options, keep):
    """Measure what is missing.

    Args:
        rows: name -> the stages of its recipe.
        known: what was measured before, to which is added.
        options: models, calibration and windows.
        keep: called when a row is finished.
    """
    for model in options.models:
        for name, stages in rows.items():
            if any((row["model"], row["row"]) == (model, name) for row in known["rows"]):
                continue
            begun = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                report = sparity.run(recipe_of(model, stages, options), output=Path(folder) / "out").report
            (candidate,) = report.candidates
            (quality,) = candidate.quality
            row = {
                "model": model,
                "row": name,
                "dense": quality.dense_perplexity,
                "perplexity": quality.perplexity,
                "kl": quality.kl,
                "zeros": statistics.fmean(change.zeros for change in candidate.totals.outcomes),
                "seconds": time.process_time() - begun,
                "curves": {c.name: dict(zip(c.steps, c.values, strict=True)) for c in candidate.curves},
            }
            known["rows"].append(row)
            keep()
            print(f"{model}, {name}: {row['perplexity']:.2f}, KL {row['kl']:.3f}, {row['seconds']:.0f} s", flush=True)


def main(text, rows, table):
    """Run what is missing, or show what is there.

    Args:
        text: what `--help` says.
        rows: arguments -> name -> the stages of its recipe.
        table: the finished rows as Markdown.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["zoo:llama"])
    parser.add_argument("--rows", nargs="+", help="these only")
    parser.add_argument("--calibration", default="python-docs:calibration", help="a text or a file")
    parser.add_argument("--text", default="python-docs:held-out", help="what perplexity is measured on")
    parser.add_argument("--steps", type=int, default=50, help="of one course of training")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    known = read_json_object(options.out) if options.out.exists() else {"machine": describe(), "rows": []}
    if options.table:
        print(table(known["rows"]))
    else:
        chosen = {name: stages for name, stages in rows(options).items() if not options.rows or name in options.rows}
        run(chosen, known, options, lambda: write_json(options.out, plain(known)))
