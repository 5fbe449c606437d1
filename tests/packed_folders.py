"""What tests of packed checkpoints share: tensors, logits, and transformers in a process of its own."""

import json
import subprocess
import sys

import torch

import mutants
from sparity.models import Decoder

TOKENS = torch.arange(40).reshape(2, 20) % 97


def tensors(folder):
    source = Decoder.open(folder).source
    return {name: source.read([name])[name] for name in source.shapes()}


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.float()


SCRIPT = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    print("refused:", " ".join(str(error).split()))
else:
    print("loaded")
"""


def alone(folder, *before):
    """What transformers says of a folder in a process of its own."""
    script = "\n".join([*before, SCRIPT])
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False).stdout.strip()


def change(path, edit):
    """The file after `edit(about, header, tensors)`, its hashes made good."""
    header, tensors = mutants.split(path.read_bytes())
    about = json.loads(header["__metadata__"]["sparity"])
    edit(about, header, tensors)
    header["__metadata__"]["sparity"] = json.dumps(about)
    path.write_bytes(mutants.joined(header, tensors, mutants.random.Random(0)))
