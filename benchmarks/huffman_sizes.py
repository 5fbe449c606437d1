"""How many bytes a model's files take under Deep Compression: pruned, a codebook per matrix, a Huffman code.

    python benchmarks/huffman_sizes.py [--models zoo:llama zoo:smollm2] [--rows "half, 5 bits" ...] [--out FILE.json]

Each row is a run of the stages (no text is read), whose plain result is packed without and with the code. Of the files:
dense and packed both ways, headers included. Of the matrices of the blocks: dense, packed as they lie in
memory, and under the code, tables included; in which formats and layouts. And what is computed from the weights:

- `fixed`: a code of so many bits per weight and a float32 codebook, without any Huffman code;
- `entropy`: the entropy of each matrix's weights, one by one, zeros among them: no code of single weights goes below;
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import torch

import sparity
from results import save
from sparity.checkpoints.coded_sizes import coded_sizes
from sparity.checkpoints.source import CheckpointSource
from sparity.checkpoints.weight_files import weight_bytes
from sparity.formats.storage.values import bits
from sparity.models import Decoder
from sparity.pipeline.run.packing import convert

PRUNE = {"prune": {"score": "magnitude", "sparsity": 0.5}}
FARTHEST = 255  # the largest distance that 8 bits tell
ROWS = {
    "all weights, 4 bits": (4, []),
    "half, 4 bits": (4, [PRUNE]),
    "half, 5 bits": (5, [PRUNE]),
    "a tenth, 5 bits": (5, [{"prune": {"score": "magnitude", "sparsity": 0.9}}]),
}


def measured(model, row, folder):
    """The bytes of one model in one row; its checkpoints are written to `folder`."""
    width, before = ROWS[row]
    recipe = {
        "dtype": "bfloat16",
        "stages": [*before, {"quantize": {"method": "codebook", "bits": width}}],
        "measure": {"speed": None},
    }
    plain = sparity.run(recipe, model=model, output=folder / "plain").path
    for coding in ("none", "huffman"):
        convert(plain, folder / coding, coding=coding)
    decoder, coded = Decoder.open(plain), CheckpointSource(folder / "huffman")
    matrices = Counter()
    for name in decoder.linear_weights():
        weight = decoder.source.read([name])[name]
        matrices += Counter(dense=weight.nbytes, fixed=weight.numel() * width // 8 + 4 * 2**width)
        matrices += Counter(entropy=entropy(weight), packed=in_memory(coded, name, weight))
        assert torch.equal(bits(coded.read([name])[name]), bits(weight)), name
    sizes = coded_sizes(coded)
    return {
        "files": {
            "dense": weight_bytes(plain),
            "packed": weight_bytes(folder / "none"),
            "coded": weight_bytes(folder / "huffman"),
        },
        "matrices": {**matrices, "coded": sizes.stored},
        "formats": dict(Counter(each.entry["format"] for each in coded.matrices.values())),
        "layouts": sizes.layouts,
    }


def in_memory(source, name, weight):
    """Bytes of a matrix in its format, decoded; an ordinary tensor is dense."""
    matrix = source.matrices.get(name)
    return weight.nbytes if matrix is None else matrix.packed().nbytes


def entropy(weight):
    """Bytes."""
    counts = bits(weight).unique(return_counts=True)[1].double()
    return int((counts * (counts.sum() / counts).log2()).sum() / 8) + 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["zoo:llama", "zoo:smollm2"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found = {}
    for model in asked.models:
        for row in asked.rows:
            with tempfile.TemporaryDirectory() as room:
                found[f"{model}, {row}"] = measured(model, row, Path(room))
            save(found, asked.out)


if __name__ == "__main__":
    main()
