"""Memory and time of pruning a model larger than memory should hold, killed and resumed in the middle.

    python benchmarks/large_model.py FOLDER [--blocks 32] [--method wanda|sparsegpt] [--out FILE]

A random model of Llama-3-8B's shapes (hidden 4096, MLP 14336, 32 heads, 8 for keys and values, vocabulary 128256) is
written into FOLDER shard by shard in bfloat16: 16 GB with all 32 blocks, and as much again for the result. It is pruned
by half on 16 x 256 tokens, by a process of its own whose peak resident memory the system reports. When half of the
blocks are done the process is killed, and another one resumes.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from results import save
from sparity.measure.data.machine import describe
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.planned_memory import plan_memory
from sparity.recipe import Recipe

SAMPLES, LENGTH = 16, 256
PRUNE = {"wanda": {"score": "wanda"}, "sparsegpt": {"solver": "sparsegpt"}}
RUN = "import json, sys, sparity; sparity.run(json.loads(sys.argv[1]), output=sys.argv[2], resume=True)"


def configuration(blocks, hidden=4096, inner=14336, vocabulary=128256):
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write_model(folder, blocks, samples=SAMPLES, length=LENGTH, **shapes):
    """One shard per block and one for the rest, so that no more than a block is in memory."""
    config = configuration(blocks, **shapes)
    hidden, inner, keys = config.hidden_size, config.intermediate_size, config.hidden_size // 4
    generator = torch.Generator().manual_seed(0)
    homes = {}

    def shard(name, shapes):
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(0.02)
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        homes.update(dict.fromkeys(tensors, name))

    outside = {"embed_tokens.weight": (config.vocab_size, hidden), "norm.weight": (hidden,)}
    shard(
        "rest.safetensors",
        {"lm_head.weight": (config.vocab_size, hidden)} | {f"model.{k}": v for k, v in outside.items()},
    )
    for block in range(blocks):
        inside = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shard(f"block-{block:02d}.safetensors", {f"model.layers.{block}.{k}.weight": v for k, v in inside.items()})
    index = {"metadata": {}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, config.vocab_size, (samples, length)))


def prune(recipe, output, stop_after=None):
    """Run to the end, or kill the process when so many blocks are committed; its peak resident bytes and its time."""
    begun = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", RUN, json.dumps(recipe), str(output)])
    progress = output.with_name(output.name + ".partial") / ".sparity" / "progress.json"
    peak = 0
    while stop_after is not None and child.poll() is None:
        status = Path(f"/proc/{child.pid}/status").read_text()
        peak = max([peak] + [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")])
        if progress.exists() and json.loads(progress.read_text())["blocks"] >= stop_after:
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.5)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if stop_after is None and child.returncode != 0:
        sys.exit(f"the run failed with exit code {child.returncode}")
    return max(peak, used.ru_maxrss * 1024), time.perf_counter() - begun


def main():
    """Write the model, prune it with one kill in the middle, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--method", choices=PRUNE, default="wanda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, output = options.folder / "dense", options.folder / f"pruned-{options.method}"
    if not (model / "config.json").exists():
        model.mkdir(parents=True, exist_ok=True)
        write_model(model, options.blocks)
    for left in (output, output.with_name(output.name + ".partial")):
        shutil.rmtree(left, ignore_errors=True)
    recipe = {
        "model": str(model),
        "calibration": {"tokens": str(model / "tokens.npy")},
        "stages": [{"prune": PRUNE[options.method]}],
        "measure": {"speed": None},
    }
    first_peak, first_seconds = prune(recipe, output, stop_after=options.blocks // 2)
    second_peak, second_seconds = prune(recipe, output)
    effort = json.loads((output / "sparity.json").read_text())["report"]["candidates"][0]["effort"]
    per_block = effort["seconds_per_block"]
    predicted = plan_memory(prepare(Recipe.read(recipe))).peak
    content = {
        "command": f"python benchmarks/large_model.py FOLDER --blocks {options.blocks} --method {options.method}",
        "machine": describe(),
        "model_gigabytes": sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9,
        "peak_resident_gigabytes": max(first_peak, second_peak) / 1e9,
        "predicted_gigabytes_beside_libraries": predicted / 1e9,
        "killed_after_blocks": options.blocks // 2,
        "seconds_before_kill": first_seconds,
        "seconds_after_resume": second_seconds,
        "seconds_per_block": {
            "median": statistics.median(per_block),
            "low": min(per_block),
            "high": max(per_block),
        },
    }
    save(content, options.out)


if __name__ == "__main__":
    main()
