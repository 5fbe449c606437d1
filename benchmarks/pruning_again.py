"""Pruning again from stored statistics against pruning from the beginning, both in the independent order.

    python benchmarks/pruning_again.py FOLDER [--blocks 2] [--out FILE]

A random model with so many blocks of Llama-3-8B's shapes lies in FOLDER, as benchmarks/large_model.py writes it. Gram
matrices of 16 x 256 tokens are stored once; then Wanda and SparseGPT prune, with and without the
store in turns. The store of the whole model (32 blocks) is stated beside its measured size per block.
"""

import argparse
import shutil
import time
from pathlib import Path

import sparity
from large_model import write_model
from results import save
from sparity.calibration.store import store_bytes
from sparity.measure.data.machine import describe
from sparity.models import Decoder

METHODS = {"wanda": {"score": "wanda"}, "sparsegpt": {"solver": "sparsegpt"}}


def prune(folder, name, method, store=None):
    """Seconds of one run."""
    calibration = {"tokens": str(folder / "dense" / "tokens.npy")}
    if store is not None:
        calibration["store"] = str(store)
    recipe = {
        "model": str(folder / "dense"),
        "calibration": calibration,
        "stages": [{"prune": {"order": "independent", **method}}],
        "measure": {"speed": None},
    }
    begun = time.perf_counter()
    sparity.run(recipe, output=folder / name, force=True)
    seconds = time.perf_counter() - begun
    shutil.rmtree(folder / name)
    return seconds


def main():
    """Fill the store, then time both ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, store = options.folder / "dense", options.folder / "statistics"
    if not (model / "config.json").exists():
        model.mkdir(parents=True, exist_ok=True)
        write_model(model, options.blocks)
    shutil.rmtree(store, ignore_errors=True)
    first = prune(options.folder, "first", METHODS["sparsegpt"], store)
    results = {}
    for name, method in METHODS.items():
        seconds = {"from_store": prune(options.folder, "again", method, store)}
        seconds["from_the_beginning"] = prune(options.folder, "anew", method)
        results[name] = seconds | {"ratio": seconds["from_store"] / seconds["from_the_beginning"]}
    size = sum(path.stat().st_size for path in store.glob("*.safetensors"))
    decoder = Decoder.open(model)
    stated = store_bytes(decoder, {"mean", "column_norm", "gram"})
    content = {
        "command": f"python benchmarks/pruning_again.py FOLDER --blocks {options.blocks}",
        "machine": describe(),
        "blocks": options.blocks,
        "first_run_with_store_seconds": first,
        "store_gigabytes_per_block": size / options.blocks / 1e9,
        "stated_gigabytes_per_block": stated / options.blocks / 1e9,
        "stated_gigabytes_of_32_blocks": stated / options.blocks * 32 / 1e9,
        "results": results,
    }
    save(content, options.out)


if __name__ == "__main__":
    main()
