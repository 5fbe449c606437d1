"""One pruning by 1 to N processes of one thread each: seconds of all blocks, and whether the files are the same.

    python benchmarks/processes.py [--processes 1 2] [--hidden 1024] [--blocks 2] [--rounds 3] [--out OUT]

A model of random weights, so that no file is needed. Every round runs each number of processes once; what is given is
the median, and the efficiency: the time of one process over N times that of N. It says what the machine can do only
when nothing else runs on it.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from results import save
from sparity.measure.data.machine import describe


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--solver", default="sparsegpt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def prepared(given, folder):
    """The recipe for a model of random weights and random tokens, all in a folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=4 * given.hidden,
        num_hidden_layers=given.blocks,
        num_attention_heads=given.hidden // 64,
        vocab_size=512,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 512, (given.samples, given.length)))
    recipe = {
        "model": str(folder / "model"),
        "calibration": {"tokens": str(folder / "tokens.npy")},
        "stages": [{"prune": {"score": "wanda", "solver": given.solver}}],
        "measure": {"perplexity": [], "speed": None},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def run(recipe, processes, output):
    """Seconds of the blocks, and one hash of the weights."""
    starter = [] if processes == 1 else ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *starter, "sparity", "run", str(recipe), "-o", str(output), "-q", "--force"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    report = json.loads((output / "sparity.json").read_text())["report"]
    digest = hashlib.sha256()
    for shard in sorted(output.glob("*.safetensors")):
        digest.update(shard.read_bytes())
    return sum(report["candidates"][0]["effort"]["seconds_per_block"]), digest.hexdigest()


def main():
    given = arguments()
    seconds, hashes = {count: [] for count in given.processes}, set()
    with tempfile.TemporaryDirectory() as name:
        recipe = prepared(given, Path(name))
        for _ in range(given.rounds):
            for count in given.processes:
                taken, digest = run(recipe, count, Path(name) / "out")
                seconds[count].append(taken)
                hashes.add(digest)
    one = statistics.median(seconds[min(seconds)]) * min(seconds)
    rows = [
        {
            "processes": count,
            "seconds": statistics.median(found),
            "all_seconds": found,
            "efficiency": one / (count * statistics.median(found)),
        }
        for count, found in seconds.items()
    ]
    save({"machine": describe(), "command": sys.argv, "same_files": len(hashes) == 1, "rows": rows}, given.out)


if __name__ == "__main__":
    main()
