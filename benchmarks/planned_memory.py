"""The memory that `sparity plan` predicts beside what a run takes, with and without a limit.

    python benchmarks/planned_memory.py FOLDER [--hidden 1024] [--inner 6144] [--vocabulary 64000] [--tokens 256]
                                        [--recipe NAME ...] [--limit NAME=SIZE ...] [--out FILE]

A random Llama of one block in bfloat16 is written into FOLDER unless it is there. Every recipe runs in a process of its
own. Predicted and measured are what a run takes beside Python, PyTorch and the opened model; measured is the most
resident memory that the system saw, pages of mapped files among it. `--limit` runs a recipe again within so much
memory, and says whether the checkpoint is the same.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from large_model import write_model
from results import save
from sparity.files import file_hash
from sparity.measure.data.machine import describe

RECIPES = {
    "magnitude": {"prune": {"score": "magnitude"}},
    "wanda": {"prune": {"score": "wanda"}},
    "sparsegpt": {"prune": {"solver": "sparsegpt"}},
    "sparsegpt-2of4": {"prune": {"solver": "sparsegpt", "pattern": "2:4"}},
    "gptq": {"quantize": {"method": "gptq", "bits": 4, "group": 128}},
}
RUN = """
import json, sys, sparity
from sparity.measure.data.machine import watch_peak_memory
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.planned_memory import plan_memory
from sparity.recipe import Recipe
recipe, output, limit = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3] or None
planned = plan_memory(prepare(Recipe.read(recipe), device="cpu"), limit)
with watch_peak_memory() as peak:
    before = peak()
    sparity.run(recipe, output=output, device="cpu", memory=limit)
    taken = peak() - before
found = {"predicted": planned.peak, "measured": taken, "parts": dict(planned.parts), "passes": planned.passes}
print(json.dumps(found))
"""


def measure(model, output, name, limit):
    """One run in a process of its own, and the hash of its weights."""
    recipe = {
        "model": str(model),
        "calibration": {"tokens": str(model / "tokens.npy")},
        "stages": [RECIPES[name]],
        "measure": {"perplexity": [], "speed": None},
    }
    for left in (output, output.with_name(output.name + ".partial")):
        shutil.rmtree(left, ignore_errors=True)
    command = [sys.executable, "-c", RUN, json.dumps(recipe), str(output), limit or ""]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name}: the run failed with exit code {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    hashes = [file_hash(path) for path in sorted(output.glob("*.safetensors"))]
    return {"recipe": name, "limit": limit, **found, "ratio": found["measured"] / found["predicted"]}, hashes


def main():
    """Run every recipe, without and with its limit, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=6144)
    parser.add_argument("--vocabulary", type=int, default=64000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--limit", nargs="*", default=[], metavar="NAME=SIZE")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = options.folder / f"dense-{options.hidden}-{options.inner}-{options.vocabulary}-{options.tokens}"
    if not (model / "tokens.npy").exists():
        model.mkdir(parents=True, exist_ok=True)
        shapes = {"hidden": options.hidden, "inner": options.inner, "vocabulary": options.vocabulary}
        write_model(model, 1, 2, options.tokens // 2, **shapes)
    limits = dict(each.split("=", 1) for each in options.limit)
    rows = []
    for name in options.recipe:
        free, hashes = measure(model, options.folder / "pruned", name, None)
        rows.append(free)
        if name in limits:
            limited, same = measure(model, options.folder / "pruned", name, limits[name])
            rows.append({**limited, "same_checkpoint": same == hashes})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    shapes = f"--hidden {options.hidden} --inner {options.inner} --vocabulary {options.vocabulary}"
    command = f"python benchmarks/planned_memory.py FOLDER {shapes} --tokens {options.tokens}"
    save({"command": command, "machine": describe(), "rows": rows}, options.out)


if __name__ == "__main__":
    main()
