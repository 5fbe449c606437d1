"""Decoding of a 1.1 B Llama at batch 1: transformers, the engine dense and sparse, and llama.cpp, in turns.

    python benchmarks/decode.py FOLDER --prepare
    python benchmarks/decode.py FOLDER [--variants NAME;NAME;...] [--rounds 5] [--tokens 24] [--threads 2] [--out FILE]

Random weights (16 blocks, hidden 2048, 32 heads, 8 of them for keys and values, FFN 8192, vocabulary 32,000, untied)
decode as fast as trained ones. --prepare writes them into FOLDER once, as a checkpoint and as GGUF, 6 GB. The variants
that are named are then loaded, pruned by magnitude and packed, or given thresholds (TEAL's, at all inputs of the
blocks) below which channels are skipped; all are held in memory at once and take turns in each round. --out adds the
run to those that FILE has. llama.cpp needs llama-cpp-python, in this Python (`pip install 'sparity[bench]'`) or in one
that --llama-python names.

Beside each engine variant, the products of one token are timed alone in the same rounds, called as the decoding step
calls them. The rest of a token's time is Python, transformers' `generate`, attention, norms and other small operations.
"""

import argparse
import ctypes
import json
import statistics
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import permutations
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparity.dynamic.activations.functions import with_activations
from sparity.engine.attach import attach
from sparity.engine.kernels import native
from sparity.files import read_json_object
from sparity.measure.data.machine import describe
from sparity.measure.data.report import plain
from sparity.measure.peers.llama import GgufModel, Llama, check_same, find_python
from sparity.measure.timing.contenders import held_bytes
from sparity.measure.timing.generation import Timed, time_generation
from sparity.measure.timing.interleave import ratios, spread, take_turns
from sparity.measure.timing.speed import pace
from sparity.models.gguf_writer import write_gguf
from sparity.models.loading import load
from sparity.static.prune.patterns.base import build_pattern

PROMPT = 32
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SPARSITIES = {"dense": None, "50 %": 0.5, "70 %": 0.7, "2:4": "2:4"}
SKIPPED = {"0 % skipped": 0.0, "40 % skipped": 0.4, "50 % skipped": 0.5, "65 % skipped": 0.65}  # of the channels
VALUES = {"bf16": "same", "int8": "int8", "int4": {"int4": {"group": 128}}}
PEERS = ("bf16", "Q8_0", "Q4_0")
VARIANTS = [
    "transformers",
    *(f"engine {sparsity} {values}" for values in VALUES for sparsity in (*SPARSITIES, *SKIPPED)),
    *(f"llama.cpp {kind}" for kind in PEERS),
]


def place(folder, peer=None):
    """Where the dense checkpoint lies, or the GGUF file of a kind."""
    return folder / (f"{peer}.gguf" if peer else "dense")


def prepare(folder, llama, threads):
    """Write the dense checkpoint and the GGUF files that are not there yet."""
    if not place(folder).exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(place(folder))
    first, *others = PEERS
    if not place(folder, first).exists():
        write_gguf(load(place(folder)), place(folder, first))
    check_same(load(place(folder)), GgufModel(llama, place(folder, first), PROMPT, threads))
    for kind in others:
        if not place(folder, kind).exists():
            llama.quantise(place(folder, first), place(folder, kind), kind, threads)


def prune(model, sparsity):
    """Zero the smallest weights of every linear layer of the blocks, in place."""
    pattern = build_pattern("2:4" if sparsity == "2:4" else "unstructured")
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            weight = layer.weight.detach()
            keep = pattern.keep(weight.abs().float(), 0.5 if sparsity == "2:4" else sparsity, "layer")
            weight.masked_fill_(~keep, 0)
    return model


def skip_channels(model, share, open_):
    """Leave out a share of the channels at every linear layer of the blocks, in place, until `open_` is left."""
    ids = torch.randint(model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    return open_.enter_context(with_activations(model, ids, method="teal", sparsity=share))


def open_variant(folder, variant, context, llama, open_):
    """(what times one generation, bytes of weights, what times one token's products or None)."""
    if variant.startswith("llama.cpp"):
        path = place(folder, variant.removeprefix("llama.cpp "))
        model = GgufModel(llama, path, context, torch.get_num_threads())
        return model.time_generation, path.stat().st_size, None
    model = load(place(folder))
    if variant == "transformers":
        return partial(time_generation, model), held_bytes(model), None
    sparsity, values = variant.removeprefix("engine ").rsplit(" ", 1)
    if sparsity == "dense":
        attach(model, form="dense", values=VALUES[values])
    elif sparsity in SKIPPED:
        attach(skip_channels(model, SKIPPED[sparsity], open_), values=VALUES[values])
    else:
        attach(prune(model, SPARSITIES[sparsity]), values=VALUES[values])
    return partial(time_generation, model), held_bytes(model), partial(time_products, model, SKIPPED.get(sparsity, 0))


def time_products(model, skipped, ids, tokens):
    """Seconds for the products of one token, called as the decoding step calls them: the median of `tokens`.

    Of the inputs of the blocks' products a share `skipped` is 0.
    """
    groups = [
        group
        for block in model.model.layers
        for attention, mlp in [(block.self_attn, block.mlp)]
        for group in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
    ]
    calls = [product_call([layer.prepared.native for layer in group], skipped) for group in groups]
    calls.append(product_call([model.lm_head.prepared.native]))
    found = []
    for _ in range(tokens):
        begun = time.perf_counter()
        for call in calls:
            call()
        found.append(time.perf_counter() - begun)
    return Timed(0.0, statistics.median(found))


def product_call(weights, skipped=0.0):
    """A call without arguments that multiplies weights which share an input; nothing but the library's work is left."""
    x = torch.randn(1, weights[0].packed.shape[1]).bfloat16()
    x[torch.rand(x.shape) < skipped] = 0
    outs = [torch.empty(weight.packed.shape[0], dtype=torch.bfloat16) for weight in weights]
    pointers = ctypes.c_void_p * len(weights)
    addresses, targets = pointers(*(weight.address for weight in weights)), pointers(*(out.data_ptr() for out in outs))
    inputs = pointers(*[x.data_ptr()] * len(weights))

    def call(kept=(x, outs)):  # in memory as long as the call is
        native.library().sparity_gemv_many(addresses, len(weights), inputs, targets, False, 1, native.threads())

    return call


def measure(folder, variants, options, llama, open_):
    """One run: the variants and their products in turns."""
    ids = torch.arange(1, PROMPT + 1)[None]
    opened = {name: open_variant(folder, name, PROMPT + options.tokens + 1, llama, open_) for name in variants}
    turns = {name: partial(generate, ids, options.tokens) for name, (generate, _, _) in opened.items()}
    turns |= {
        f"products of {name}": partial(alone, ids, options.tokens) for name, (_, _, alone) in opened.items() if alone
    }
    times = dict(zip(turns, take_turns(list(turns.values()), options.rounds), strict=True))
    tokens = {name: [time.token for time in found] for name, found in times.items()}
    measured = {}
    for name, (_, size, alone) in opened.items():
        found = pace(times[name], 1)
        measured[name] = {
            "weight_bytes": size,
            "tokens_per_second": vars(found.decode),
            "first_token": vars(found.first_token),
        }
        if alone:
            rest = [whole - part for whole, part in zip(tokens[name], tokens[f"products of {name}"], strict=True)]
            measured[name]["products"] = vars(spread(tokens[f"products of {name}"]))
            measured[name]["rest_of_a_token"] = vars(spread(rest))
    over = {f"{a} / {b}": vars(ratios(tokens[b], tokens[a])) for a, b in permutations(variants, 2)}
    return {"rounds": options.rounds, "prompt": PROMPT, "tokens": options.tokens, "variants": measured, "ratios": over}


def main():
    """Prepare, or measure and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--variants", default=";".join(VARIANTS), help=f"of {'; '.join(VARIANTS)}".replace("%", "%%"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    variants = [name.strip() for name in options.variants.split(";")]
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        parser.error(f"no variant {unknown[0]!r}; there are: {'; '.join(VARIANTS)}")
    python = find_python(options.llama_python)
    peers = options.prepare or any(name.startswith("llama.cpp") for name in variants)
    if peers and python is None:
        parser.error("llama-cpp-python is not installed here: --llama-python, or --variants without it")
    with Llama(python) if peers else nullcontext() as llama:
        if options.prepare:
            prepare(options.folder, llama, options.threads)
        else:
            run_variants(variants, options, llama)


def run_variants(variants, options, llama):
    """One run, printed and added to those that --out has."""
    with ExitStack() as open_:
        measured = measure(options.folder, variants, options, llama, open_)
    run = {
        "command": f"python benchmarks/decode.py FOLDER --variants '{';'.join(variants)}' --rounds {options.rounds}",
        "machine": {**describe(), "llama-cpp-python": llama and llama.version},
        **measured,
    }
    known = read_json_object(options.out)["runs"] if options.out and options.out.exists() else []
    text = json.dumps(plain({"shape": SHAPE, "runs": [*known, run]}), indent=1)
    print(json.dumps(plain(run), indent=1))
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
