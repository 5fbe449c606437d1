"""Logits of cut models in stock llama.cpp against ours: one size, a size per block, attention left out, biases.

    python benchmarks/gguf_logits.py --llama-python PYTHON [--model zoo:llama] [--tokens 48] [--out FILE.json]

Each is cut in float32, written as GGUF in float32, and run by llama.cpp with keys and values in float32. PYTHON is one
that has llama-cpp-python.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader

import sparity
from sparity.files import write_json
from sparity.measure.data.machine import describe
from sparity.measure.peers.llama import GgufModel, Llama
from sparity.models.gguf_writer import write_gguf


def shapes(model):
    """Name -> a model of that shape."""
    config = model.config
    blocks, width, groups = config.num_hidden_layers, config.intermediate_size, config.num_key_value_heads
    steps = [range(width * (index % 4 + 1) // 4) for index in range(blocks)]
    tokens = torch.randint(0, config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(1))
    return {
        "dense": model,
        "hidden size, uniform": sparity.cut(model, {"hidden_size": range(config.hidden_size * 5 // 6)}),
        "channels by block": sparity.cut(model, {"mlp_channels": steps}),
        "channels and heads by block": sparity.cut(
            model, {"mlp_channels": steps, "kv_groups": [range(1 + index % groups) for index in range(blocks)]}
        ),
        "attention of every second block gone": sparity.cut(model, {"attention": range(0, blocks, 2)}),
        "flap, with biases, by block": sparity.restructure(model, tokens, method="flap", sparsity=0.3),
    }


def main():
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--model", default="zoo:llama")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, found = sparity.load(options.model, dtype="float32"), {}
    ids = torch.randint(0, model.config.vocab_size, (options.tokens,), generator=torch.Generator().manual_seed(0))
    with Llama(options.llama_python) as llama, tempfile.TemporaryDirectory() as folder:
        for name, cut in shapes(model).items():
            path = Path(folder) / "model.gguf"
            write_gguf(cut, path, GGMLQuantizationType.F32)
            with torch.no_grad():
                ours = cut(ids[None]).logits[0]
            theirs = GgufModel(llama, path, options.tokens, torch.get_num_threads(), exact=True).logits(ids)
            found[name] = {
                "architecture": GGUFReader(path).fields["general.architecture"].contents(),
                "bytes": path.stat().st_size,
                "largest logit": float(ours.abs().max()),
                "largest difference": float((ours - theirs).abs().max()),
            }
            print(f"{name:38} {found[name]['architecture']:6} {found[name]['largest difference']:.1e}")
        machine = {**describe(), "llama-cpp-python": llama.version}
    if options.out:
        write_json(options.out, {"machine": machine, "model": options.model, "shapes": found})


if __name__ == "__main__":
    main()
