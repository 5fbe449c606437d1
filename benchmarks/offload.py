"""Decoding a model whose weights do not fit a limit of memory that a cgroup keeps: offloaded, and mapped from a file.

    python benchmarks/offload.py FOLDER OUT.json [--memory 1.2GB] [--process 450MB] [--tokens 48] [--threads 1]
        [--rounds 2] [--llama-python PYTHON]

Two models of Llama's shape with random weights in bfloat16 (hidden 2048, MLP 8192, 16 blocks: 2 GB) are written into
FOLDER: `relu`, whose gates have biases by which a neuron counts for a tenth of random inputs, by a power law, and
`swiglu` with CATS at 50 %. Contenders decode the same random tokens, each in a process of its own within a cgroup of
`--memory` + `--process` bytes, in turns:

    offload          within --memory; without lookahead; `lookahead` with it, `hot only`, `window only` a part of it
    mapped           transformers' model over the mapped file, dense
    llama.cpp        the same weights as GGUF, mapped (swiglu, with --llama-python)

Bytes are those that the process had read from the disk, by the system's count. Caches are dropped before each.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import sparity
from sparity.dynamic.offload.loading import ATTRIBUTE
from sparity.files import write_json
from sparity.measure.data.machine import describe
from sparity.memory import as_bytes

PROMPT, WARM = 16, 8
LLAMA = """
import json, sys, time
from pathlib import Path
from llama_cpp import Llama

path, threads, steps, prompt = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
model = Llama(path, n_ctx=256, n_threads=threads, n_threads_batch=threads, use_mmap=True, verbose=False)
found = []
for fresh in (steps[:prompt], *([token] for token in steps[prompt:])):
    begun = time.perf_counter()
    model.eval(fresh)
    taken = time.perf_counter() - begun
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    found.append((taken, int(lines["read_bytes"])))
print(json.dumps(found))
"""
OPTIONS = {"offload": {}, "lookahead": {"ahead": True}, "hot only": {"hot": 1.0}, "window only": {"hot": 0.0}}
CGROUPS = Path("/sys/fs/cgroup")


def configuration(kind):
    """Of Llama's shape; `relu` has biases in its MLP."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=8192, max_position_embeddings=2048, tie_word_embeddings=True, dtype="bfloat16",
        hidden_act="relu" if kind == "relu" else "silu", mlp_bias=kind == "relu", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def make(folder, kind):
    """A dense model and its offloaded form in `folder`, unless they are there."""
    plain, far = folder / f"{kind}-plain", folder / f"{kind}-far"
    tokens = np.random.default_rng(0).integers(0, 8192, (4, 64))
    if not far.exists():
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(configuration(kind), dtype=torch.bfloat16)
        if kind == "relu":
            with torch.no_grad():
                for block in model.model.layers:
                    block.mlp.gate_proj.bias.copy_(biases(block.mlp.gate_proj.weight))
        model.save_pretrained(plain, max_shard_size="100GB")
        del model
        source = plain
        if kind == "swiglu":
            np.save(folder / "tokens.npy", tokens)
            source = folder / "swiglu-cats"
            recipe = {
                "model": str(plain), "calibration": {"tokens": str(folder / "tokens.npy")},
                "stages": [{"activations": {"method": "cats", "sparsity": 0.5}}],
                "measure": {"perplexity": [], "speed": None},
            }  # fmt: skip
            sparity.run(recipe, output=source)
        sparity.offload(source, far, tokens=tokens)
        if source != plain:
            shutil.rmtree(source)
    return plain, far


def biases(weight):
    """By which neuron i of n counts with a probability like 1 / (i + n / 20), 0.1 on average, for inputs of size 1."""
    count = len(weight)
    share = 1 / (torch.arange(count) + count / 20)
    share = (share * 0.1 * count / share.sum()).clamp_max(0.95)[torch.randperm(count)]
    return weight.float().norm(dim=1) * torch.special.ndtri(share.double()).float()


def decode(model, steps):
    """Seconds of each step: the prompt, then the given tokens one by one."""
    from transformers import DynamicCache

    tokens, cache = torch.from_numpy(steps), DynamicCache(config=model.config)
    with torch.no_grad():
        for fresh in (tokens[:PROMPT], *tokens[PROMPT:].split(1)):
            begun = time.perf_counter()
            model(input_ids=fresh[None], past_key_values=cache, logits_to_keep=1)
            yield time.perf_counter() - begun


def tokens_of(options):
    """Random ones, the same for all contenders."""
    return np.random.default_rng(1).integers(0, 8192, PROMPT + WARM + options.tokens)


def child(options):
    """One contender in its own process; prints what it found."""
    steps = tokens_of(options)
    torch.set_num_threads(options.threads)
    found = {}
    if options.child == "mapped":
        model = mapped(options.model)
    else:
        model = sparity.load_offloaded(options.model, options.memory, **{"ahead": False, **OPTIONS[options.child]})
        found = {"bound": model.sparity_offload.bound.words, "bytes of weights": model.sparity_offload.memory_bytes}
    held = getattr(model, ATTRIBUTE, None)
    seconds, before, begun = [], {}, 0
    for number, taken in enumerate(decode(model, steps)):
        seconds.append(taken)
        if number == WARM:
            begun, before = blocks(), dict(vars(held.counts)) if held else {}
    found |= rates(seconds[WARM + 1 :], blocks() - begun)
    if held:
        more = {name: count - before[name] for name, count in vars(held.counts).items()}
        found |= {
            "hit rate": 1 - more["missed"] / more["asked"],
            "bytes needed per token": more["asked"] * held.far_bytes / held.units / options.tokens,
            "bytes asked of the disk per token": more["bytes"] / options.tokens,
            "read ahead": more["ahead"],
            "of it needed": more["ahead_used"],
        }
        held.close()
    found["prompt seconds"] = seconds[0]
    print(json.dumps(found))


def mapped(folder):
    """A model whose weights are the mapped file's pages."""
    from safetensors.torch import load_file

    from sparity.models import transformers as hf

    model = hf.empty_model(hf.read_config(folder), torch.bfloat16)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def rates(seconds, count):
    """Of the tokens after the warm ones."""
    return {
        "tokens/s": len(seconds) / sum(seconds),
        "seconds per token, median": statistics.median(seconds),
        "bytes from disk per token": count / len(seconds),
    }


def blocks():
    """Bytes that this process had read from the disk."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


class Limit:
    """A cgroup below this process's own that holds no more than so many bytes, cached pages of files among them."""

    def __init__(self, most):
        line = next((x for x in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in x), None)
        self.old = line is not None  # the first version of cgroups
        line = line or next(x for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::"))
        root = CGROUPS / "memory" if self.old else CGROUPS
        self.folder = root / line.split(":", 2)[2].lstrip("/") / f"sparity-offload-{os.getpid()}"
        self.folder.mkdir()
        names = ("memory.limit_in_bytes",) if self.old else ("memory.max",)
        for name in names:
            (self.folder / name).write_text(str(most))

    def join(self):
        """Put the calling process in."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self):
        """The most bytes that were in it."""
        name = "memory.max_usage_in_bytes" if self.old else "memory.peak"
        return int((self.folder / name).read_text())

    def close(self):
        """Take it away; the processes in it have ended."""
        for _ in range(50):
            try:
                return self.folder.rmdir()
            except OSError:
                time.sleep(0.1)


def drop(path):
    """Leave nothing of some files in the system's cache."""
    for file in [path] if path.is_file() else path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(name, model, options):
    """One contender under the limit."""
    drop(model)
    limit = Limit(as_bytes(options.memory) + as_bytes(options.process))
    words = ["--child", name, "--model", str(model), "--memory", options.memory]
    words += ["--tokens", str(options.tokens), "--threads", str(options.threads)]
    command = [sys.executable, __file__, ".", ".", *words]
    if name == "llama.cpp":
        words = [str(model), str(options.threads), json.dumps(tokens_of(options).tolist()), str(PROMPT)]
        command = [options.llama_python, "-c", LLAMA, *words]
    try:
        done = subprocess.run(command, preexec_fn=limit.join, capture_output=True, text=True, check=False)
        peak = limit.peak()
    finally:
        limit.close()
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}
    found = json.loads(done.stdout.splitlines()[-1])
    if name == "llama.cpp":
        seconds, read = zip(*found, strict=True)
        found = {**rates(seconds[WARM + 1 :], read[-1] - read[WARM]), "prompt seconds": seconds[0]}
    return {**found, "peak bytes of the process and its cached pages": peak}


def main():
    """Make the models, let all contenders decode in turns, and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--memory", default="1.2GB")
    parser.add_argument("--process", default="450MB")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--only", help="some contenders, joined by commas")
    parser.add_argument("--kinds", default="relu,swiglu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": describe(), "memory": options.memory, "process": options.process, "tokens": options.tokens,
        "results": {},
    }  # fmt: skip
    for kind in options.kinds.split(","):
        plain, far = make(options.folder, kind)
        contenders = dict.fromkeys(OPTIONS, far) | {"mapped": plain}
        if kind == "swiglu" and options.llama_python:
            contenders |= gguf(plain)
        sizes = {name: sum(f.stat().st_size for f in path.iterdir()) for name, path in (("plain", plain), ("far", far))}
        if options.only:
            contenders = {name: contenders[name] for name in options.only.split(",") if name in contenders}
        found = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, model in contenders.items():
                found[name].append(run(name, model, options))
                print(kind, name, json.dumps(found[name][-1]), flush=True)
        content["results"][kind] = {"bytes of files": sizes, "rounds": found}
        write_json(options.out, content)


def gguf(plain):
    """The contender llama.cpp."""
    from sparity.models.gguf_export import export_gguf

    path = plain.with_name(f"{plain.name}.gguf")
    if not path.exists():
        export_gguf(plain, path)
    return {"llama.cpp": path}


if __name__ == "__main__":
    main()
