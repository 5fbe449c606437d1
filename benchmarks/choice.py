"""What `prefer: speed` stores at each density, and its time over our own dense path's, for one input.

    python benchmarks/choice.py [--shapes 2048x2048,8192x2048] [--densities 0.5,1.0] [--values same,int8] [--out FILE]

The formats are timed anew, as `sparity convert --prefer speed` would on a machine that it does not know; then the
weight in the chosen format and the dense one take turns, each call with the caches cold. A side's time in a round is
its fastest of three calls; a ratio is the chosen one's time over dense's within a round: 1.03 or less is what choosing
promises. Given are medians over the rounds with the lowest and the highest. Where dense is chosen both sides are the
same: their ratio shows the noise.
"""

import argparse
import os
import sys
import tempfile

import torch

from gemv import ratio, seconds, spread, weight
from results import save
from sparity.engine.kernels import choice_file, prepare
from sparity.engine.kernels.fastest import fastest_format
from sparity.formats import build_format
from sparity.measure.data.machine import describe

SHAPES = "2048x2048,512x2048,8192x2048,2048x8192"  # q and o, k and v, gate and up, down of a 1.1 B Llama
DENSITIES = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0"
SWEPT = 128 << 20  # bytes read before each call


def measure(rows, columns, density, values, rounds, sweep):
    """The choice for one random mask, and how its time compares with dense's."""
    matrix = weight("bitmask", rows, columns, 1 - density, torch.Generator().manual_seed(0))
    found = fastest_format(matrix, values)
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    sides = {
        "chosen": prepare(found.format.pack(matrix, values)),
        "dense": prepare(build_format("dense").pack(matrix, values)),
    }
    times = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side in list(sides) if number % 2 else reversed(list(sides)):
            taken = fastest_cold(sides[side], x, sweep)
            if number:  # the first round warms up
                times[side].append(taken)
    return {
        "chosen": found.format.name,
        "how": found.choice.how,
        "timed": {candidate.name: candidate.seconds for candidate in found.choice.candidates},
        "microseconds": {side: spread([one * 1e6 for one in taken]) for side, taken in times.items()},
        "over dense": ratio(times["chosen"], times["dense"]),
    }


def fastest_cold(prepared, x, sweep):
    """The fastest of three calls."""
    found = []
    for _ in range(3):
        sweep.sum()
        found.append(seconds(lambda _: prepared(x), [None]))
    return min(found)


def main():
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--densities", default=DENSITIES)
    parser.add_argument("--values", default="same,int8")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sweep = torch.ones(SWEPT // 8, dtype=torch.int64)
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"SPARITY_CACHE": cache, "SPARITY_CHOICE": "timed"}
        for values in options.values.split(","):
            for shape in options.shapes.split(","):
                for density in map(float, options.densities.split(",")):
                    rows, columns = map(int, shape.split("x"))
                    found = measure(rows, columns, density, values, options.rounds, sweep)
                    results[f"{shape}, {values}, {density:.0%} kept"] = found
                    over = found["over dense"]
                    shown = f"{over['median']:.2f} ({over['low']:.2f}-{over['high']:.2f})"
                    print(
                        f"{shape} {values} {density:.0%}: {found['chosen']}, {shown}, {found['how']}", file=sys.stderr
                    )
    worst = max(results, key=lambda name: results[name]["over dense"]["median"])
    content = {
        "command": f"python benchmarks/choice.py --shapes {options.shapes} --densities {options.densities} "
        f"--values {options.values} --rounds {options.rounds} --threads {options.threads}",
        "machine": {**describe(), "kernels": choice_file.machine()},
        "load": os.getloadavg(),
        "slowest": {worst: results[worst]["over dense"]},
        "results": results,
    }
    save(content, options.out)


if __name__ == "__main__":
    main()
