"""Quality against speed on one real model: SmolLM2 in Sparity and in llama.cpp, from the same weights, in turns.

    python benchmarks/pareto.py FOLDER --prepare [--calibration FILE] [--samples 24] [--llama-python PYTHON]
    python benchmarks/pareto.py FOLDER --text wikitext-2/test.txt [--windows 12] [--variants NAME;...] [--out FILE.json]

--prepare prunes by SparseGPT and, where there is llama-cpp-python, writes the dense weights as GGUF, quantised by
llama.cpp's own code. The variants are then opened together: the perplexity of each on WikiText-2, then decode speed in
turns. The plot is written beside --out; a variant that another one beats in both is named. llama.cpp runs in a process
of its own: in the Python that --llama-python names, else in this one where it has llama-cpp-python.

The weights of zoo:smollm2 come from a 4-bit grid (Q4_1): converted to Q4_1 again they lose nearly nothing, which says
nothing about 4-bit quantisation of other models.
"""

import argparse
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from sparity.cli.console import ProgressBar
from sparity.engine.attach import attach
from sparity.files import write_json, write_text
from sparity.measure.charts.tradeoff import dominated, tradeoff
from sparity.measure.data.machine import describe
from sparity.measure.data.report import Contestant, plain
from sparity.measure.peers.llama import GgufModel, Llama, check_same, find_python
from sparity.measure.timing.contenders import held_bytes
from sparity.measure.timing.generation import time_generation
from sparity.measure.timing.interleave import ratios, take_turns
from sparity.measure.timing.speed import pace
from sparity.models.gguf_writer import write_gguf
from sparity.models.loading import load, load_tokenizer
from sparity.pipeline.run.runner import execute
from sparity.quality.perplexity import perplexity
from sparity.recipe import Recipe

MODEL = "zoo:smollm2"
WINDOW, PROMPT = 512, 32
RECIPES = {
    "30 %": {"sparsity": 0.3},
    "50 %": {"sparsity": 0.5},
    "70 %": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}
VALUES = {  # of the blocks; embedding and head are in bfloat16 beside bf16, in int8 beside the others, as in Q4_0
    "bf16": "same",
    "int8": "int8",
    "int4": {"int4": {"group": 32}},  # as Q4_0
    "int4w": {"int4": {"group": 64}},  # which divides rows of 576
    "int4z": {"int4": {"group": 32, "symmetric": False}},  # with zero points: the grid of Q4_1
}
WRITTEN = ("BF16", "F16")  # the others are quantised from the first
PEERS = (*WRITTEN, "Q8_0", "Q4_1", "Q4_0")
OURS = ("transformers", *(f"{name} {values}" for values in VALUES for name in ("dense", *RECIPES)))
THEIRS = tuple(f"llama.cpp {kind}" for kind in PEERS)


def prepare(folder, options):
    """Prune what is not there yet, and write the GGUF files."""
    for name, prune in RECIPES.items():
        if place(folder, name).exists():
            continue
        recipe = {
            "model": MODEL,
            "dtype": "float32",
            "calibration": {"text": options.calibration, "samples": options.samples, "length": WINDOW, "batch": 4},
            "stages": [{"prune": {"solver": "sparsegpt", **prune}}],
            "measure": {"perplexity": [options.calibration], "window": WINDOW, "windows": 1, "speed": None},
        }
        with ProgressBar(quiet=False) as progress:
            execute(Recipe.read(recipe), progress, output=place(folder, name), resume=True)
    python = find_python(options.llama_python)
    if python is None:
        print("llama-cpp-python is not installed: no peers")
        return
    model = load(MODEL)
    with Llama(python) as llama:
        for kind, path in ((kind, place(folder, f"llama.cpp {kind}")) for kind in PEERS):
            if not path.exists() and kind in WRITTEN:
                write_gguf(model, path, GGMLQuantizationType[kind])
            elif not path.exists():
                llama.quantise(place(folder, f"llama.cpp {WRITTEN[0]}"), path, kind, options.threads)
        check_same(model, GgufModel(llama, place(folder, f"llama.cpp {WRITTEN[0]}"), WINDOW, options.threads))


def place(folder, name):
    """Where a pruned model lies, or a GGUF file."""
    if name in THEIRS:
        return folder / f"{name.removeprefix('llama.cpp ')}.gguf"
    return folder / name.replace(" ", "").replace("%", "").replace(":", "of")


class Ours:
    """A model of ours as it is run, in bfloat16."""

    def __init__(self, folder, name):
        recipe, _, values = name.rpartition(" ")
        self.kind = "dense" if recipe in ("", "dense") else "sparse"
        self.model = load(place(folder, recipe) if self.kind == "sparse" else MODEL, dtype="bfloat16")
        if name != "transformers":
            form = {"form": "dense"} if recipe == "dense" else {}
            attach(self.model, values=VALUES[values], embeddings="same" if values == "bf16" else "int8", **form)
        self.bytes, self.generate = held_bytes(self.model), partial(time_generation, self.model)

    def perplexity(self, windows):
        return perplexity(self.model, windows.flatten(), WINDOW)


class Theirs:
    """A GGUF file in llama.cpp; its perplexity by the same protocol, from its own logits."""

    kind = "peer"

    def __init__(self, llama, folder, name):
        path = place(folder, name)
        self.model = GgufModel(llama, path, WINDOW, torch.get_num_threads())
        self.bytes, self.generate, self.perplexity = (
            path.stat().st_size,
            self.model.time_generation,
            self.model.perplexity,
        )


def measure(folder, names, options, llama):
    """Perplexity of each variant, and their decode speeds in turns; `llama` is what runs the peers."""
    ids = torch.tensor(load_tokenizer(MODEL)(Path(options.text).read_text(), verbose=False)["input_ids"])
    windows = ids[: options.windows * WINDOW].view(-1, WINDOW)
    opened = {name: Theirs(llama, folder, name) if name in THEIRS else Ours(folder, name) for name in names}
    quality = {name: variant.perplexity(windows) for name, variant in opened.items()}
    turns = [partial(variant.generate, ids[None, :PROMPT], options.tokens) for variant in opened.values()]
    times = dict(zip(names, take_turns(turns, options.rounds), strict=True))
    contestants = [
        Contestant(name, pace(times[name], 1).decode, quality[name], variant.kind, variant.bytes)
        for name, variant in opened.items()
    ]
    base = [time.token for time in times[names[0]]]
    return contestants, {
        "machine": {**describe(), "llama-cpp-python": llama and llama.version},
        "text": {"file": Path(options.text).name, "window": WINDOW, "windows": options.windows},
        "rounds": options.rounds,
        "variants": {
            one.name: {
                "perplexity": one.perplexity,
                "tokens_per_second": vars(one.rate),
                f"over {names[0]}": vars(ratios(base, [time.token for time in times[one.name]])),
                "weight_bytes": one.weight_bytes,
            }
            for one in contestants
        },
        "dominated": dominated(contestants),
    }


def main():
    """Prepare, or measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--calibration", default="wikitext-2/valid.txt")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--text", default="wikitext-2/test.txt")
    parser.add_argument("--windows", type=int, default=12)
    known = "; ".join((*OURS, *THEIRS)).replace("%", "%%")
    parser.add_argument("--variants", help=f"of {known}; left out, all that can be opened here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.prepare:
        prepare(options.folder, options)
        return
    python = find_python(options.llama_python)
    here = [name for name in THEIRS if python and place(options.folder, name).exists()]
    names = [name.strip() for name in options.variants.split(";")] if options.variants else [*OURS, *here]
    unknown = [name for name in names if name not in (*OURS, *THEIRS)]
    if unknown:
        parser.error(f"no variant {unknown[0]!r}; there are: {'; '.join((*OURS, *THEIRS))}")
    peers = any(name in THEIRS for name in names)
    if peers and python is None:
        parser.error("llama-cpp-python is not installed here: --llama-python")
    with Llama(python) if peers else nullcontext() as llama:
        contestants, found = measure(options.folder, names, options, llama)
    for one in contestants:
        beaten = f"  beaten by {found['dominated'][one.name]}" if one.name in found["dominated"] else ""
        print(f"{one.name:20} perplexity {one.perplexity:8.2f} {one.rate.median:8.1f} tokens/s{beaten}")
    if options.out:
        write_json(options.out, plain(found))
        write_text(options.out.with_suffix(".svg"), tradeoff("SmolLM2-135M: quality against decode speed", contestants))


if __name__ == "__main__":
    main()
