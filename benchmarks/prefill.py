"""Prefill: weights panel by panel, against PyTorch's products with a dense weight in bfloat16 and in float32.

    python benchmarks/prefill.py [--shapes 4096x4096,14336x4096] [--tokens 32,128,1024] [--rounds 5] [--out FILE]

The sides take turns; a ratio is PyTorch's time over ours within a round, given as median, lowest and highest.
`SPARITY_PRODUCTS=own` or `float32` says what the products of ours are computed in, whatever is faster here.
"""

import argparse
import os
import sys

import torch

from gemv import ratio, seconds, spread, weight
from results import save
from sparity.engine.kernels import native
from sparity.engine.kernels.native_weight import NativeWeight
from sparity.engine.kernels.prefill.cpu import prefill
from sparity.formats import build_format
from sparity.measure.data.machine import describe
from sparity.products.choice import words
from sparity.products.panels import linear

CASES = {
    "bitmask bf16 50 %": ("bitmask", "same"),
    "2:4 bf16": ("two_of_four", "same"),
    "bitmask int8 50 %": ("bitmask", "int8"),
    "2:4 int8": ("two_of_four", "int8"),
}
DENSE = "dense bf16"
TORCH = {"PyTorch bf16": torch.bfloat16, "PyTorch float32": torch.float32}


def measure(sets, columns, tokens, rounds):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    calls = {case: lambda item: prefill(item, x) for case in CASES}
    calls[DENSE] = lambda item: linear(x, item)
    wide = {dtype: x.to(dtype) for dtype in TORCH.values()}
    calls |= {name: lambda item: torch.nn.functional.linear(wide[item.dtype], item) for name in TORCH}
    times = {case: [] for case in calls}
    for number in range(rounds + 1):
        for case in list(calls) if number % 2 else reversed(list(calls)):
            taken = seconds(calls[case], [sets[case]] * 3)
            if number:  # the first round warms up
                times[case].append(taken)
    return {
        case: {"milliseconds": spread([one * 1e3 for one in taken])}
        | {f"over {name}": ratio(times[name], taken) for name in TORCH}
        for case, taken in times.items()
    }


def main():
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,14336x4096")
    parser.add_argument("--tokens", default="32,128,1024")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for shape in options.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        sets = {
            case: NativeWeight(build_format(name).pack(weight(name, rows, columns, 0.5, generator), values))
            for case, (name, values) in CASES.items()
        }
        sets[DENSE] = weight("dense", rows, columns, 0.0, generator)
        sets |= {name: sets[DENSE].to(dtype) for name, dtype in TORCH.items()}
        for tokens in map(int, options.tokens.split(",")):
            name = f"{shape}, {tokens} tokens"
            results[name] = measure(sets, columns, tokens, options.rounds)
            print(name, file=sys.stderr)
            for case, found in results[name].items():
                shown = "  ".join(
                    f"{over['median']:.2f} ({over['low']:.2f}-{over['high']:.2f}) {name}"
                    for name in TORCH
                    for over in [found[f"over {name}"]]
                )
                print(f"  {case:20} {found['milliseconds']['median']:8.2f} ms  over {shown}", file=sys.stderr)
    content = {
        "command": f"python benchmarks/prefill.py --shapes {options.shapes} --tokens {options.tokens} "
        f"--rounds {options.rounds} --threads {options.threads}",
        "machine": describe(),
        "instruction_set": native.instruction_set(),
        "products": {str(dtype): words(dtype) for dtype in (torch.bfloat16, torch.int8)},
        "load": os.getloadavg(),
        "waiting": {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        "results": results,
    }
    save(content, options.out)


if __name__ == "__main__":
    main()
