"""GPU kernels: each against its reference, then against cuBLAS, PyTorch's `linear` with a dense bfloat16 weight.

    PYTHONPATH=src python benchmarks/gpu.py [--shapes 4096x4096,14336x4096] [--batches 1,16,512] [--rounds 30]
        [--launches] [--out FILE]

Needs a CUDA GPU, torch and Triton, not an installed Sparity; without a GPU it ends with 2. Every kernel is checked on
small odd shapes first, and each case on its own shape before it is timed, twice for the same bits. A case that fails is
not timed, and the command ends with 1.

Each case has a set of equal weights, together several times as large as the L2 cache; a CUDA graph multiplies with one
after the other, so that every weight comes from memory and no launch is waited for. Cases take turns within a round; a
time is that of one call, a ratio cuBLAS's time over it in the same round: medians, with the lowest and the highest.
`memory` is the speed of a copy on the GPU, reads and writes counted. `--launches` also tries other ways to cut the
work of the bitmask GEMV.
"""

import argparse
import copy
import sys

import torch

from gemv import ratio, spread, weight
from results import save
from sparity.engine.kernels import gpu
from sparity.engine.kernels.gemv import reference
from sparity.engine.kernels.gpu_weight import declines, prepare_on_gpu
from sparity.engine.kernels.triton_weight import TritonWeight
from sparity.formats import build_format, format_of
from sparity.measure.data.machine import describe, package_version

BLOCK16, BLOCK32 = {"block": {"rows": 16, "columns": 16}}, {"block": {"rows": 32, "columns": 32}}
CASES = {  # name -> format, values, share of zeros
    "bitmask bf16 50 %": ("bitmask", "same", 0.5),
    "bitmask bf16 70 %": ("bitmask", "same", 0.7),
    "bitmask bf16 90 %": ("bitmask", "same", 0.9),
    "bitmask int8 50 %": ("bitmask", "int8", 0.5),
    "2:4 bf16": ("two_of_four", "same", 0.5),
    "2:4 int8": ("two_of_four", "int8", 0.5),
    "block 16x16 bf16 50 %": (BLOCK16, "same", 0.5),
    "block 32x32 bf16 50 %": (BLOCK32, "same", 0.5),
    "columns bf16, 50 % skipped": ("columns", "same", 0.5),
    "columns int8, 50 % skipped": ("columns", "int8", 0.5),
}
CUBLAS = "cuBLAS bf16"
SMALL = ((63, 100), (100, 320), (96, 384), (257, 1030))
TOKENS = (1, 2, 7, 16, 17, 100)
LAUNCHES = [(places, splits, warps) for places in (4, 8, 16) for splits in (1, 2, 4, 8) for warps in (2, 4, 8)]
PLACE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


def wrong(packed, found, x):
    """What is wrong with a product, or None: outside the bound of its rounding errors, or other bits a second time."""
    first, again = found(x), found(x)
    if not torch.equal(first, again):
        return "two equal calls differ"
    dense = format_of(packed).decode(packed).to(x.device)
    scales = packed.tensors["scales"].to(x.device) if packed.quantized else None
    unit, place = (packed.shape[1] + 16) * 2**-23, PLACE[x.dtype]
    if isinstance(found, TritonWeight) and found.format == "bitmask" and len(x) > 16:
        unit += place  # int8 weights are rounded before the product, and cuBLAS may round its partial sums
    if scales is None:
        wanted, bound = reference.gemv(dense, x), reference.error_bound(dense, x, unit)
    elif isinstance(found, TritonWeight):
        wanted = reference.gemv_scaled(dense, scales, x)
        bound = reference.error_bound(dense.float() * scales[:, None], x, unit)
    else:
        wanted = reference.gemv_int8(dense, scales, x)
        bound = wanted.abs() * 2**-22
    bound += wanted.abs() * place
    worst = ((first.double() - wanted).abs() / bound.clamp(min=1e-300)).max().item()
    return None if worst <= 1 else f"{worst:.2f} times the bound of rounding errors"


def inputs_of(packed, x):
    """The inputs of a case: half of the channels of each token are 0 for a weight by columns."""
    if packed.format != "columns":
        return x
    return torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(2)).to(x.device) < 0.5, 0, x)


def check(device):
    """Every format, type and kind of values on small shapes -> the failures, and how many products were right."""
    failures, right = [], 0
    generator = torch.Generator().manual_seed(0)
    for name in ("bitmask", "two_of_four", "columns", BLOCK16, BLOCK32):
        kind = name if isinstance(name, str) else "block"
        for rows, columns in SMALL:
            if kind == "two_of_four" and columns % 4:
                continue
            for dtype in PLACE:
                for values in ("same", "int8"):
                    dense = weight(kind, rows, columns, 0.5, generator).to(dtype)
                    packed = build_format(name).pack(dense, values)
                    found = prepare_on_gpu(packed, device)
                    for tokens in TOKENS:
                        x = inputs_of(packed, torch.randn(tokens, columns, generator=generator).to(device, dtype))
                        if reason := wrong(packed, found, x):
                            failures.append(f"{found!r}, {dtype}, {values}, {tokens} tokens: {reason}")
                        else:
                            right += 1
    return failures, right


def twins(packed, count, device):
    """`count` weights that share no memory."""
    first = prepare_on_gpu(packed, device)
    if not isinstance(first, TritonWeight):
        return [first, *(prepare_on_gpu(packed, device) for _ in range(count - 1))]
    others = [copy.copy(first) for _ in range(count - 1)]
    for other in others:
        other.part = {name: tensor.clone() for name, tensor in first.part.items()}
    return [first, *others]


def captured(call, items):
    """A CUDA graph that calls `call` with one item after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and makes handles, which a graph cannot
        for item in items[:2]:
            call(item)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for item in items:
            call(item)
    return graph


def microseconds(graph, count):
    """The time of one of the `count` calls of a graph."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / count


def rounds_of(graphs, counts, rounds):
    """Name -> its time in each round; the order turns around from round to round."""
    times = {name: [] for name in graphs}
    for number in range(-3, rounds):  # the first three warm up
        for name in list(graphs) if number % 2 else reversed(list(graphs)):
            taken = microseconds(graphs[name], counts[name])
            if number >= 0:
                times[name].append(taken)
    return times


def prepared(rows, columns, device):
    """Case -> its packed matrix and its set of weights on the GPU, and why some cases are left out."""
    cache = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    generator = torch.Generator().manual_seed(0)
    sets, left_out = {}, {}
    for case, (name, values, sparsity) in CASES.items():
        kind = name if isinstance(name, str) else "block"
        packed = build_format(name).pack(weight(kind, rows, columns, sparsity, generator), values)
        if reason := declines(packed, device):
            left_out[case] = reason
        else:
            sets[case] = (packed, twins(packed, max(2, -(-cache // packed.nbytes)), device))
    size = rows * columns * 2
    plain = weight("dense", rows, columns, 0.0, generator).to(device)
    sets[CUBLAS] = (build_format("dense").pack(plain), [plain.clone() for _ in range(max(2, -(-cache // size)))])
    return sets, left_out


def measure(sets, columns, batch, rounds, device):
    """Case -> times, bytes and ratios, or what is wrong with its results."""
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    results, graphs, counts = {}, {}, {}
    for case, (packed, items) in sets.items():
        given = inputs_of(packed, x)
        if case != CUBLAS and (reason := wrong(packed, items[0], given)):
            results[case] = {"wrong": reason}
            continue
        call = (lambda item: torch.nn.functional.linear(x, item)) if case == CUBLAS else (lambda item, x=given: item(x))
        graphs[case], counts[case] = captured(call, items), len(items)
    times = rounds_of(graphs, counts, rounds)
    for case, taken in times.items():
        size = sets[case][0].nbytes // (2 if sets[case][0].format == "columns" else 1)  # half of the channels are read
        results[case] = {
            "kernel": repr(sets[case][1][0]) if case != CUBLAS else "torch.nn.functional.linear",
            "microseconds": spread(taken),
            "bytes": size,
            "gigabytes_per_second": spread([size / one / 1000 for one in taken]),
            "bound": sets[CUBLAS][0].nbytes / size,
            "over cuBLAS": ratio(times[CUBLAS], taken),
        }
    return results


def launches(items, columns, batch, rounds, device):
    """Times of other cuts of the bitmask GEMV, the fastest first."""
    from sparity.engine.kernels.gemv.triton import Launch, gemv, launch_for

    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    cuts = {launch_for(items[0], batch), *(Launch(*numbers) for numbers in LAUNCHES)}
    graphs = {cut: captured(lambda item, cut=cut: gemv(item, x, launch=cut), items) for cut in cuts}
    times = rounds_of(graphs, dict.fromkeys(graphs, len(items)), rounds)
    ranked = sorted(cuts, key=lambda cut: spread(times[cut])["median"])
    return [{"launch": repr(cut), "microseconds": spread(times[cut])} for cut in ranked]


def memory_speed(device):
    """Gigabytes per second of a copy on the GPU, reads and writes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    graph = captured(target.copy_, [source])
    return spread([2 * source.numel() / microseconds(graph, 1) / 1000 for _ in range(10)])


def show(name, results):
    print(name, file=sys.stderr)
    for case, found in results.items():
        if "wrong" in found:
            print(f"  {case:22} WRONG: {found['wrong']}", file=sys.stderr)
        else:
            time, over = found["microseconds"], found["over cuBLAS"]
            print(
                f"  {case:22} {time['median']:8.1f} us ({time['low']:.1f}-{time['high']:.1f})  over cuBLAS "
                f"{over['median']:.2f} ({over['low']:.2f}-{over['high']:.2f})  bound {found['bound']:.2f}",
                file=sys.stderr,
            )


def main():
    """Check, measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336")
    parser.add_argument("--batches", default="1,16,512")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--launches", action="store_true", help="time other cuts of the bitmask GEMV too")
    parser.add_argument("--out")
    options = parser.parse_args()
    device = torch.device("cuda")
    if reason := gpu.unavailable(device):
        print(f"nothing was measured: {reason}", file=sys.stderr)
        return 2
    failures, right = check(device)
    print(f"small shapes: {right} products right, {len(failures)} wrong", *failures, sep="\n  ", file=sys.stderr)
    results, left_out, cuts = {}, {}, {}
    for shape in options.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        sets, left_out[shape] = prepared(rows, columns, device)
        for batch in map(int, options.batches.split(",")):
            name = f"{shape}, batch {batch}"
            results[name] = measure(sets, columns, batch, options.rounds, device)
            show(name, results[name])
            if options.launches and batch <= 16:
                cuts[name] = launches(sets["bitmask bf16 50 %"][1], columns, batch, 5, device)
                print("  fastest launches", *cuts[name][:3], sep="\n    ", file=sys.stderr)
        del sets
        torch.cuda.empty_cache()
    content = {
        "command": "PYTHONPATH=src python benchmarks/gpu.py " + " ".join(sys.argv[1:]),
        "machine": {**describe(), "triton": package_version("triton"), "cuda": torch.version.cuda},
        "memory": memory_speed(device),
        "small shapes": {"right": right, "wrong": failures},
        "left out": left_out,
        "results": results,
        "launches": cuts,
    }
    save(content, options.out)
    return 1 if failures or any("wrong" in found for case in results.values() for found in case.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
