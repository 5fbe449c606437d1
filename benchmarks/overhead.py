"""What a token costs beside its products: a model so narrow that its products take next to no time.

    python benchmarks/overhead.py [--blocks 16] [--tokens 64] [--rounds 7] [--out FILE]

A random Llama of hidden 64 generates with transformers alone and attached to the engine, in turns. Milliseconds per
token, the median of a round, are given as median, lowest and highest over the rounds.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from results import save
from sparity.engine.attach import attach
from sparity.measure.data.machine import describe
from sparity.measure.timing.generation import time_generation
from sparity.measure.timing.interleave import ratios, spread, take_turns


def model(blocks):
    """A random model in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=320,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def main():
    """Measure and print or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    ids = torch.arange(1, 33)[None]
    contenders = {"transformers": model(options.blocks), "engine": attach(model(options.blocks))}
    calls = [partial(time_generation, contender, ids, options.tokens) for contender in contenders.values()]
    times = [[found.token for found in rounds] for rounds in take_turns(calls, options.rounds)]
    content = {
        "command": f"python benchmarks/overhead.py --blocks {options.blocks} --rounds {options.rounds}",
        "machine": describe(),
        "milliseconds_per_token": {
            name: vars(spread([1e3 * one for one in found])) for name, found in zip(contenders, times, strict=True)
        },
        "transformers / engine": vars(ratios(*times)),
    }
    save(content, options.out)


if __name__ == "__main__":
    main()
