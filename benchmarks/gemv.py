"""GEMV: every kernel against our dense one, PyTorch's, and the speed of memory.

    python benchmarks/gemv.py [--shapes 4096x4096,4096x14336] [--batches 1,4] [--rounds 15]
        [--threads 2] [--only columns] [--clock wall]

Each case has a set of weights that is larger than the last cache, so that every call reads from memory; the cases
take turns within a round. A case's time in a round is its fastest call, because a thread that loses its core to
something else costs milliseconds; a ratio is the other side's time over this one's within a round. Given are the
medians over all rounds with the lowest and the highest. `bound` is what the bytes alone would allow over dense bf16.
Of `columns`, a share of each token's inputs is zero (several tokens have zeros of their own), and only the bytes of the
other channels count. `--clock processor`, for one thread on a busy machine, counts the time that the thread ran.
"""

import argparse
import os
import statistics
import sys
import time

import torch

from results import save
from sparity.engine.kernels import native
from sparity.engine.kernels.gemv.cpu import gemv
from sparity.engine.kernels.native_weight import NativeWeight, on_large_pages
from sparity.formats import build_format
from sparity.measure.data.machine import describe

CASES = {  # name -> format, values, share of zeros among the weights; of columns: among the inputs
    "dense bf16": ("dense", "same", 0.0),
    "bitmask bf16 50 %": ("bitmask", "same", 0.5),
    "bitmask bf16 70 %": ("bitmask", "same", 0.7),
    "2:4 bf16": ("two_of_four", "same", 0.5),
    "block 16x16 bf16 50 %": ("block", "same", 0.5),
    "dense int8": ("dense", "int8", 0.0),
    "bitmask int8 50 %": ("bitmask", "int8", 0.5),
    "bitmask int8 70 %": ("bitmask", "int8", 0.7),
    "2:4 int8": ("two_of_four", "int8", 0.5),
    **{
        f"{name} int4 / {group}{share}": (form, {"int4": {"group": group}}, sparsity)
        for group in (32, 64, 128)
        for name, form, share, sparsity in (
            ("dense", "dense", "", 0.0),
            ("bitmask", "bitmask", " 50 %", 0.5),
            ("2:4", "two_of_four", "", 0.5),
        )
    },
    **{f"columns bf16 {share} %": ("columns", "same", share / 100) for share in (0, 25, 50, 70)},
    **{f"columns int8 {share} %": ("columns", "int8", share / 100) for share in (0, 25, 50, 70)},
    **{
        f"columns int4 / {group} {share} %": ("columns", {"int4": {"group": group}}, share / 100)
        for group in (32, 128)
        for share in (0, 25, 50, 70)
    },
}
DENSE, TORCH, READ = "dense bf16", "PyTorch bf16", "memory, read only"
CACHE = 160 << 20  # bytes of weights per case, more than the last cache holds


def weight(name, rows, columns, sparsity, generator):
    """A random weight in the pattern of a format."""
    dense = torch.randn(rows, columns, generator=generator).bfloat16()
    if name == "two_of_four":
        order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
        return dense.masked_fill_((order >= 2).flatten(1), 0)
    if name == "block":
        gone = torch.rand(-(-rows // 16), -(-columns // 16), generator=generator) < sparsity
        gone = gone.repeat_interleave(16, 0).repeat_interleave(16, 1)
        return dense.masked_fill_(gone[:rows, :columns], 0)
    return dense.masked_fill_(torch.rand(rows, columns, generator=generator) < sparsity, 0) if sparsity else dense


def fits(case, columns):
    """Whether the groups of a case divide a row."""
    values = case[1]
    return not isinstance(values, dict) or columns % values["int4"]["group"] == 0


def is_dense(case):
    """What others are compared with."""
    return case.startswith("dense ")


def seconds(call, items, clock=time.perf_counter):
    """The fastest call over a set of weights."""
    found = []
    for item in items:
        begun = clock()
        call(item)
        found.append(clock() - begun)
    return min(found)


def spread(numbers):
    return {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}


def prepared(cases, rows, columns, cache=CACHE):
    """Case -> its set of weights and the bytes of one that a call reads."""
    generator = torch.Generator().manual_seed(0)
    sets, by_channel = {}, {}
    for case, (name, values, sparsity) in cases.items():
        if name == "columns" and str(values) in by_channel:
            same, size = by_channel[str(values)]
            sets[case] = (same, size * (1 - sparsity))
            continue
        first = weight(name, rows, columns, 0.0 if name == "columns" else sparsity, generator)
        packed = build_format(name).pack(first, values)
        count = max(2, -(-cache // packed.nbytes))
        sets[case] = ([NativeWeight(packed) for _ in range(count)], packed.nbytes)
        if name == "columns":
            by_channel[str(values)] = sets[case]
            sets[case] = (sets[case][0], packed.nbytes * (1 - sparsity))
    size = rows * columns * 2
    count = max(2, -(-cache // size))
    plain = weight("dense", rows, columns, 0.0, generator)
    sets[TORCH] = ([plain.clone() for _ in range(count)], size)
    memory = on_large_pages(torch.ones(size, dtype=torch.uint8))
    sets[READ] = ([memory, *(on_large_pages(memory) for _ in range(count - 1))], size)
    return sets


def measure(cases, sets, rows, columns, batch, rounds, clock):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, columns, generator=generator).bfloat16()
    out = torch.empty(batch, rows, dtype=torch.bfloat16)
    drawn = torch.rand(batch, columns, generator=generator)

    def multiply(name, share):
        inputs = x.masked_fill(drawn < share, 0) if name == "columns" else x
        return lambda item: gemv(item, inputs, out)

    calls = {case: multiply(name, share) for case, (name, _, share) in cases.items()}
    calls[TORCH] = lambda item: torch.nn.functional.linear(x, item)
    calls[READ] = lambda item: native.library().sparity_read(item.data_ptr(), item.numel(), native.threads())
    times = {case: [] for case in calls}
    for number in range(rounds + 1):
        for case in list(calls) if number % 2 else reversed(list(calls)):
            taken = seconds(calls[case], sets[case][0], clock)
            if number:  # the first round warms up
                times[case].append(taken)
    results = {}
    for case, taken in times.items():
        size = sets[case][1]
        results[case] = {
            "microseconds": spread([one * 1e6 for one in taken]),
            "bytes": size,
            "gigabytes_per_second": spread([size / one / 1e9 for one in taken]),
            "bound": sets[DENSE][1] / size,
            **{f"over {other}": ratio(times[other], taken) for other in (*filter(is_dense, times), TORCH)},
            "of memory speed": spread(
                [size / one / (sets[READ][1] / read) for one, read in zip(taken, times[READ], strict=True)]
            ),
        }
    return results


def ratio(others, taken):
    return spread([other / one for other, one in zip(others, taken, strict=True)])


def main():
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="cases with this in their names, and dense")
    parser.add_argument("--out")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    options = parser.parse_args()
    if options.clock == "processor" and options.threads != 1:
        parser.error("--clock processor: for --threads 1")
    clock = time.perf_counter if options.clock == "wall" else time.thread_time
    torch.set_num_threads(options.threads)
    results = {}
    cases = {name: case for name, case in CASES.items() if options.only in name or is_dense(name)}
    for shape in options.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        fitting = {name: case for name, case in cases.items() if fits(case, columns)}
        sets = prepared(fitting, rows, columns)
        for batch in map(int, options.batches.split(",")):
            name = f"{shape}, batch {batch}"
            results[name] = measure(fitting, sets, rows, columns, batch, options.rounds, clock)
            print(name, file=sys.stderr)
            for case, found in results[name].items():
                shown = [f"{key} {found[key]['median']:.2f}" for key in found if key.startswith("o")]
                print(f"  {case:22} {found['microseconds']['median']:7.0f} us", *shown, sep="  ", file=sys.stderr)
    content = {
        "command": f"python benchmarks/gemv.py --shapes {options.shapes} --batches {options.batches} "
        f"--rounds {options.rounds} --threads {options.threads}"
        + (f" --only {options.only}" if options.only else "")
        + (f" --clock {options.clock}" if options.clock != "wall" else ""),
        "machine": describe(),
        "instruction_set": native.instruction_set(),
        "load": os.getloadavg(),
        "waiting": {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        "results": results,
    }
    save(content, options.out)


if __name__ == "__main__":
    main()
