"""Experts that are skipped while a mixture runs: how many, what their weights weigh, and how far predictions move.

    python benchmarks/expert_skipping.py [--model zoo:moe] [--sparsities 0.25 0.5 0.75 0.9] [--out OUT.json]

Thresholds are found on --samples windows of --length tokens of --calibration. On --windows windows of 512 tokens of
--text: the share of the experts behind each token's first that is skipped, the share of a token's expert weights that
it does not need, perplexity, KL to the dense model in nats per token, and the share of equal likeliest tokens. The last
row leaves every token its first expert alone. In float32.
"""

import argparse

import torch
from held_windows import Texts, mean

import sparity
from results import save
from sparity.calibration.text import read_documents
from sparity.calibration.tokens import Windows, draw_windows
from sparity.dynamic.expert_skipping.calibrating import found_thresholds
from sparity.dynamic.expert_skipping.skipping import experts_of_sites, skipping
from sparity.measure.data.machine import describe
from sparity.models.attached_runtime import input_sites
from sparity.models.cuts.experts import top_k
from sparity.models.loading import load_tokenizer
from sparity.quality.perplexity import exp


def measured(model, experts, thresholds, texts):
    """One row: the held-out text with these thresholds."""
    visits = []
    with skipping(experts, thresholds):
        handles = [
            module.register_forward_pre_hook(lambda module, given: visits.append(given[1].numel()))
            for module in experts.values()
        ]
        windows = [found for _, found in texts.measured(model)]
        for handle in handles:
            handle.remove()
    every = top_k(model.config) * len(experts) * sum(ids.numel() for ids in texts.windows["text"])
    first = every // top_k(model.config)
    return {
        "skipped": (every - sum(visits)) / (every - first),
        "weights_not_needed": 1 - sum(visits) / every,
        "dense_perplexity": exp(mean(windows, "dense_loss")),
        "perplexity": exp(mean(windows, "loss")),
        "kl": mean(windows, "kl"),
        "top1": mean(windows, "top1"),
        "thresholds": list(thresholds.values()),
    }


def main():
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:moe")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--calibration", default="python-docs:calibration", help="a text or a file")
    parser.add_argument("--text", default="python-docs:held-out", help="what is measured on")
    for name, default in (("samples", 32), ("length", 256), ("windows", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out")
    options = parser.parse_args()
    model, tokenizer = sparity.load(options.model, dtype="float32"), load_tokenizer(options.model)
    experts = experts_of_sites(input_sites(model))
    drawn = Windows(options.samples, options.length, documents="joined")
    tokens = torch.as_tensor(draw_windows(read_documents(options.calibration), tokenizer, drawn))
    texts = Texts(model, tokenizer, {"text": options.text}, options.windows)
    rows = {}
    for sparsity in options.sparsities:
        rows[f"{sparsity:g}"] = measured(model, experts, found_thresholds(model, experts, tokens, sparsity), texts)
    rows["the first alone"] = measured(model, experts, dict.fromkeys(experts, 1.0), texts)
    for name, row in rows.items():
        print(name, {key: round(value, 4) for key, value in row.items() if key != "thresholds"}, flush=True)
    save({**vars(options), "machine": describe(), "rows": rows}, options.out)


if __name__ == "__main__":
    main()
