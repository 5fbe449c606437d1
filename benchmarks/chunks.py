"""From how many new tokens on a model's own code, layer by layer, reads a prompt faster than the step of the library.

    python benchmarks/chunks.py [--rounds 7] [--out FILE]

A random Llama, half of its weights zero in the pattern 2:4, is held dense, bitmask and 2:4 on the engine. Prompts of
several lengths are read in one call of the library and by the model's own code, in turns: the ratio of their times
(own code / one call) is given as median, lowest and highest over the rounds.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from results import save
from sparity.engine.attach import attach
from sparity.engine.decoding import fast_path
from sparity.measure.data.machine import describe
from sparity.measure.timing.interleave import ratios, take_turns

TOKENS = (4, 8, 16, 24, 32, 48, 64, 128)


def model():
    """A random model in bfloat16 of which every four neighbouring weights of the blocks have two zeros."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=24,
        num_key_value_heads=4,
        vocab_size=320,
    )
    made = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "layers" in name and weight.ndim == 2:
                weight.view(-1, 4)[:, 1::2] = 0
    return made


def read(subject, ids, most):
    """Read a prompt, in one call of the library up to `most` tokens: seconds are taken by the caller."""
    fast_path.MOST_TOKENS = most
    with torch.no_grad():
        subject.model(input_ids=ids, past_key_values=DynamicCache(config=subject.config))


def main():
    """Measure and print or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {}
    for form in ("dense", "bitmask", "two_of_four"):
        subject = attach(model(), form=form)
        for tokens in TOKENS:
            ids = torch.arange(tokens)[None] % 320
            calls = [partial(seconds, partial(read, subject, ids, most)) for most in (0, max(TOKENS))]
            found.setdefault(form, {})[tokens] = vars(ratios(*take_turns(calls, options.rounds)))
    content = {
        "command": f"python benchmarks/chunks.py --rounds {options.rounds}",
        "machine": describe(),
        "own code / one call": found,
    }
    save(content, options.out)


def seconds(call):
    """What one call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
