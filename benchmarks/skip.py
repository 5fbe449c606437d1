"""What finding the channels that count takes, by each rule: processor time of one thread, the call from Python counted.

python benchmarks/skip.py [--columns 576,4096,14336] [--calls 300]
"""

import argparse
import statistics
import time

import torch

from results import save
from sparity.engine.kernels.skip.cpu import CODES, NativeSkip, skip
from sparity.engine.kernels.skip.reference import SkipRule
from sparity.measure.data.machine import describe


def microseconds(rule, x, calls):
    """Of one call: the median with the fastest and the slowest quarter's bounds."""
    out, taken = torch.empty_like(x), []
    for _ in range(calls):
        begun = time.thread_time_ns()
        skip(rule, x, out=out)
        taken.append((time.thread_time_ns() - begun) / 1e3)
    low, median, high = statistics.quantiles(taken)
    return {"median": median, "low": low, "high": high}


def main():
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", default="576,4096,14336")
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for columns in map(int, options.columns.split(",")):
        x = torch.randn(1, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        thresholds = torch.rand(columns, generator=torch.Generator().manual_seed(1))
        for scale in CODES:
            rule = SkipRule(thresholds, None, scale, columns // 2, 0.1)
            results[f"{columns}, {scale}"] = microseconds(NativeSkip(rule, columns), x, options.calls)
    command = f"python benchmarks/skip.py --columns {options.columns} --calls {options.calls}"
    save({"command": command, "machine": describe(), "results": results}, options.out)


if __name__ == "__main__":
    main()
