"""Decode speed of packed models beside the dense one, in transformers, batch 1, the two taking turns.

    python benchmarks/decode.py FOLDER [--rounds 5] [--threads N] [--out FILE]

A random Llama of a billion weights in bfloat16 (hidden 2048, MLP 8192, 16 blocks, 8 of 32 heads for keys and values,
vocabulary 32000) is written into FOLDER, pruned by magnitude and packed. The dense model is stock transformers with
PyTorch's own products. Random weights decode as fast as trained ones; quality is not looked at.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparity
from sparity.measure.machine import describe

VARIANTS = {
    "50 %": ({"sparsity": 0.5}, "same"),
    "70 %": ({"sparsity": 0.7}, "same"),
    "2:4": ({"pattern": "2:4"}, "same"),
    "50 %, int8": ({"sparsity": 0.5}, "int8"),
    "2:4, int8": ({"pattern": "2:4"}, "int8"),
}


def write_model(folder):
    """A random model in one shard."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def main():
    """Pack each variant, time it, and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = options.folder / "dense"
    if not (model / "config.json").exists():
        write_model(model)
    results = {}
    for name, (prune, values) in VARIANTS.items():
        recipe = {
            "stages": [{"prune": {"score": "magnitude", **prune}}],
            "measure": {"speed": {"prompt": 32, "tokens": 16, "rounds": options.rounds}},
            "output": {"format": "packed", "values": values},
        }
        output = options.folder / "packed"
        candidate = sparity.run(recipe, model=str(model), output=output, force=True).report.to_dict()["candidates"][0]
        shutil.rmtree(output)
        results[name] = {
            "gigabytes": {"dense": candidate["bytes_dense"] / 1e9, "packed": candidate["bytes_sparse"] / 1e9},
            "tokens_per_second": {
                "dense": candidate["speed"]["dense"]["decode"],
                "packed": candidate["speed"]["sparse"]["decode"],
            },
            "decode_ratio": candidate["speed"]["decode_ratio"],
            "first_token_ratio": candidate["speed"]["first_token_ratio"],
        }
        print(name, json.dumps(results[name]), file=sys.stderr)
    content = {
        "command": f"python benchmarks/decode.py FOLDER --rounds {options.rounds}",
        "machine": describe(),
        "threads": torch.get_num_threads(),
        "results": results,
    }
    text = json.dumps(content, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
