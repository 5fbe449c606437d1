"""Scoring and solving time of one decoder block, ours against the loops of the papers' code, in one run.

    python benchmarks/pruning_speed.py [--rounds 3] [--out FILE]

The block has the shapes of a 1.1 B Llama (hidden 2048, MLP 8192, 8 of 32 heads for keys and values); inputs are random.
The baseline does what the reference repositories do: a running norm or Hessian and a factorisation for each projection,
a full sort for the mask, one pass of the column loop. Forward passes are the same for both and timed by themselves.
Both take turns; the ratio of a round is ours over the baseline's.
"""

import argparse
import statistics
import sys
import time
from functools import partial

import torch

from results import save
from sparity.calibration import Statistics
from sparity.measure.data.machine import describe
from sparity.static.prune.pruning import Pruning

HIDDEN, MLP, KEYS = 2048, 8192, 512
SITES = {
    "q_k_v": (HIDDEN, (HIDDEN, KEYS, KEYS)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate_up": (HIDDEN, (MLP, MLP)),
    "down": (MLP, (HIDDEN,)),
}
SAMPLES, TOKENS, DAMPING, WIDTH = 16, 256, 0.01, 128


def baseline_norm(inputs):
    """Wanda's running mean of squared norms."""
    total = torch.zeros(inputs.shape[-1])
    for count, sequence in enumerate(inputs):
        total *= count / (count + 1)
        total += sequence.T.norm(dim=1) ** 2 / (count + 1)
    return total


def baseline_wanda(weight, inputs, n_of_m):
    """A stable sort of every row, or group by group for 2:4."""
    metric = weight.abs() * baseline_norm(inputs).sqrt()
    prune = torch.zeros_like(weight, dtype=torch.bool)
    if n_of_m:
        for column in range(0, weight.shape[1], 4):
            group = metric[:, column : column + 4].topk(2, dim=1, largest=False).indices
            prune.scatter_(1, column + group, True)
    else:
        order = torch.sort(metric, dim=-1, stable=True).indices
        prune.scatter_(1, order[:, : weight.shape[1] // 2], True)
    return torch.where(prune, 0.0, weight)


def baseline_sparsegpt(weight, inputs, n_of_m):
    """The column loop on a Hessian of the projection's own."""
    hessian = torch.zeros(inputs.shape[-1], inputs.shape[-1])
    for count, sequence in enumerate(inputs):
        hessian *= count / (count + 1)
        scaled = (2 / (count + 1)) ** 0.5 * sequence.T
        hessian += scaled @ scaled.T
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    weight = weight.clone()
    for start in range(0, weight.shape[1], WIDTH):
        end = min(start + WIDTH, weight.shape[1])
        block, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        local = factor[start:end, start:end]
        scores = block**2 / local.diagonal() ** 2
        if n_of_m:
            prune = torch.zeros_like(block, dtype=torch.bool)
        else:
            prune = scores <= scores.flatten().sort().values[scores.numel() // 2]
        for i in range(end - start):
            if n_of_m and i % 4 == 0:
                current = block[:, i : i + 4] ** 2 / local.diagonal()[i : i + 4] ** 2
                prune.scatter_(1, i + current.topk(2, dim=1, largest=False).indices, True)
            kept = torch.where(prune[:, i], 0.0, block[:, i])
            error = (block[:, i] - kept) / local[i, i]
            block[:, i:] -= error[:, None] @ local[None, i, i:]
            block[:, i] = kept
            errors[:, i] = error
        weight[:, start:end] = block
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def ours(weights, inputs, pruning):
    """The statistics of one input serve all projections that read it."""
    collected = Statistics.gather("site", pruning.needs)
    for sequence in inputs:
        collected.add(sequence)
    return [pruning.apply(weight, collected, 0.5)[0] for weight in weights]


def each(baseline, weights, inputs, n_of_m):
    """Every projection by itself."""
    return [baseline(weight, inputs, n_of_m) for weight in weights]


def timed(function):
    begun = time.perf_counter()
    result = function()
    return time.perf_counter() - begun, result


def forward_seconds():
    """One pass of the calibration tokens through a block of these shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.zeros(SAMPLES, TOKENS, dtype=torch.long)
    with torch.no_grad():
        model.model(tokens[:1])
        return timed(lambda: [model.model(row[None]) for row in tokens])[0]


def main():
    """Time every method and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    data = {
        name: (
            [torch.randn(rows, columns, generator=generator) for rows in heights],
            torch.randn(SAMPLES, TOKENS, columns, generator=generator) * torch.rand(columns, generator=generator),
        )
        for name, (columns, heights) in SITES.items()
    }
    results = {}
    for method, baseline in (("wanda", baseline_wanda), ("sparsegpt", baseline_sparsegpt)):
        for pattern in ("unstructured", "2:4"):
            pruning = Pruning.of(pattern=pattern, **({"score": "wanda"} if method == "wanda" else {"solver": method}))
            rounds, agreement = [], []
            for number in range(options.rounds):
                seconds = {"ours": 0.0, "baseline": 0.0}
                for weights, inputs in data.values():
                    sides = {
                        "ours": partial(ours, weights, inputs, pruning),
                        "baseline": partial(each, baseline, weights, inputs, pattern == "2:4"),
                    }
                    found = {}
                    for side in ("ours", "baseline") if number % 2 else ("baseline", "ours"):
                        taken, found[side] = timed(sides[side])
                        seconds[side] += taken
                    agreement += [
                        float(((a == 0) == (b == 0)).float().mean())
                        for a, b in zip(found["ours"], found["baseline"], strict=True)
                    ]
                rounds.append(seconds)
            ratios = [one["ours"] / one["baseline"] for one in rounds]
            results[f"{method}, {pattern}"] = {
                "ours_seconds": statistics.median(one["ours"] for one in rounds),
                "baseline_seconds": statistics.median(one["baseline"] for one in rounds),
                "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
                "least_mask_agreement": min(agreement),
            }
            print(f"{method}, {pattern}: {results[f'{method}, {pattern}']}", file=sys.stderr)
    content = {
        "command": f"python benchmarks/pruning_speed.py --rounds {options.rounds}",
        "machine": describe(),
        "tokens": SAMPLES * TOKENS,
        "forward_seconds_per_pass": forward_seconds(),
        "results": results,
    }
    save(content, options.out)


if __name__ == "__main__":
    main()
