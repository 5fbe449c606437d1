"""A prompt by blocks of attention against SDPA: the whole prompt's time, and how far predictions move.

    python benchmarks/block_attention.py --text FILE [--error 0.1] [--tokens 4096] [--rounds 3] [--model zoo:smollm2]
        [--method '{"spargeattn": {"sinks": 64}}'] [--block 64] [--threads 1] [--out OUT.json]

Shares are calibrated on the text's first window; the next ones are measured: KL to the model with SDPA over every
position, and the seconds of a prompt without its head, in turns.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import sparity
from results import save
from sparity.measure.data.machine import describe
from sparity.models.loading import load_tokenizer


@torch.no_grad()
def read(model, ids):
    """The last hidden states of a prompt, and seconds."""
    start = time.perf_counter()
    states = model.base_model(ids).last_hidden_state[0]
    return states, time.perf_counter() - start


@torch.no_grad()
def divergence(model, dense, sparse):
    """KL of predictions from hidden states, nats per token."""
    total = 0.0
    for p, q in zip(dense.split(256), sparse.split(256), strict=True):
        p, q = (model.lm_head(each).float().log_softmax(-1) for each in (p, q))
        total += float((p.exp() * (p - q)).sum())
    return total / len(dense)


def main():
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out")
    parser.add_argument("--model", default="zoo:smollm2")
    parser.add_argument("--method", default='{"spargeattn": {"sinks": 64}}')
    for name, default in (("tokens", 4096), ("rounds", 3), ("block", 64), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--error", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = sparity.load(options.model, dtype="bfloat16")
    ids = torch.tensor(load_tokenizer(options.model)(Path(options.text).read_text()[:400_000]).input_ids)
    windows = ids[: len(ids) // options.tokens * options.tokens].view(-1, 1, options.tokens)
    ((name, more),) = json.loads(options.method).items()
    chosen = {"method": name, "block": options.block, **more}
    shares = sparity.calibrate_attention(model, windows[0], error=options.error, **chosen)
    rows = []
    for window in windows[1 : options.rounds + 1]:
        dense, slow = read(model, window)
        with sparity.with_attention_blocks(model, shares=shares, **chosen):
            sparse, fast = read(model, window)
        moved = divergence(model, dense, sparse)
        rows.append({"sdpa_seconds": slow, "seconds": fast, "ratio": slow / fast, "kl": moved})
        print(rows[-1], flush=True)
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    found["kl"] = statistics.mean(row["kl"] for row in rows)
    whole = sum(float((share >= 1).sum()) for share in shares) / sum(len(share) for share in shares)
    save({**vars(options), "machine": describe(), "rows": rows, "found": found, "heads_whole": whole}, options.out)


if __name__ == "__main__":
    main()
