"""GEMV: one instruction set against another on the same weights, in turns.

    python benchmarks/instruction_sets.py [--sets avx2,avx_vnni] [--shapes 4096x14336] [--batches 1,4] [--rounds 15]
        [--threads 2] [--only int8] [--megabytes 160] [--out FILE]

Weights and times are those of gemv.py: a side's time in a round is its fastest call, and a ratio is the time with the
first instruction set over the time with another within a round, so that above 1 the other is faster. Given are medians
over the rounds with the lowest and the highest.
"""

import argparse
import os
import sys

import torch

from gemv import CACHE, CASES, READ, TORCH, fits, prepared, ratio, seconds, spread
from results import save
from sparity.engine.kernels import native
from sparity.engine.kernels.gemv.cpu import gemv
from sparity.measure.data.machine import describe


def measure(cases, weights, columns, rows, batch, names, rounds):
    """Case -> microseconds by instruction set, and how many times as fast as the first the others are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, columns, generator=generator).bfloat16()
    drawn = torch.rand(batch, columns, generator=generator)
    out = torch.empty(batch, rows, dtype=torch.bfloat16)
    times = {case: {name: [] for name in names} for case in cases}
    for number in range(rounds + 1):
        for case, (format_name, _, share) in cases.items():
            inputs = x.masked_fill(drawn < share, 0) if format_name == "columns" else x
            for name in names if number % 2 else names[::-1]:
                with native.using(name):
                    taken = seconds(lambda item, inputs=inputs: gemv(item, inputs, out), weights[case][0])
                if number:  # the first round warms up
                    times[case][name].append(taken)
    return {
        case: {
            "microseconds": {name: spread([one * 1e6 for one in taken]) for name, taken in found.items()},
            **{f"{name} over {names[0]}": ratio(found[names[0]], found[name]) for name in names[1:]},
        }
        for case, found in times.items()
    }


def main():
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="avx2,avx_vnni")
    parser.add_argument("--shapes", default="4096x14336")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="int", help="cases with this in their names")
    parser.add_argument("--megabytes", type=int, default=CACHE >> 20, help="weights per case: more than the last cache")
    parser.add_argument("--out")
    options = parser.parse_args()
    names = options.sets.split(",")
    if missing := [name for name in names if name not in native.instruction_sets()]:
        parser.error(f"--sets: this processor has no {', '.join(missing)}, but {', '.join(native.instruction_sets())}")
    torch.set_num_threads(options.threads)
    results = {}
    for shape in options.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        cases = {name: case for name, case in CASES.items() if options.only in name and fits(case, columns)}
        weights = prepared(cases, rows, columns, options.megabytes << 20)
        for unused in (TORCH, READ):
            del weights[unused]
        for batch in map(int, options.batches.split(",")):
            place = f"{shape}, batch {batch}"
            results[place] = measure(cases, weights, columns, rows, batch, names, options.rounds)
            print(place, file=sys.stderr)
            for case, found in results[place].items():
                shown = [f"{key} {found[key]['median']:.2f}" for key in found if " over " in key]
                print(f"  {case:24}", *shown, sep="  ", file=sys.stderr)
    content = {
        "command": f"python benchmarks/instruction_sets.py --sets {options.sets} --shapes {options.shapes} "
        f"--batches {options.batches} --rounds {options.rounds} --threads {options.threads} --only {options.only}",
        "machine": describe(),
        "load": os.getloadavg(),
        "results": results,
    }
    save(content, options.out)


if __name__ == "__main__":
    main()
