"""Exact mode on many prompts: are all tokens the dense model's, how many drafts are right, and what it is worth.

    python benchmarks/exact.py OUT.json --text wikitext-2/test.txt,gsm8k/test.jsonl:question [--prompts 200]
        [--tokens 48] [--length 32] [--method teal] [--sparsity 0.4] [--sites all] [--draft 4] [--model zoo:smollm2]

The prompts are windows of the texts, as many of each; FILE:FIELD reads a field of a jsonl file. For each prompt three
decode the same number of tokens, greedily and by the same loop, each first in its turn: `dense`, attached as it is;
`same layout`, the model whose activations are skipped, but nothing of it skipped; and `exact`. Exact mode promises the
tokens of the second, bit for bit. Speeds are of the tokens after the first. Prompts are written as they are done, and
the same command goes on after them.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache

import sparity
from sparity.dynamic.speculate.exact import generate_exact
from sparity.engine.attach import attach
from sparity.engine.modules.skips import tokens_of
from sparity.files import read_json_object, write_json
from sparity.measure.data.machine import describe
from sparity.models.loading import load, load_tokenizer
from sparity.pipeline.run.tokens import calibration_tokens
from sparity.recipe import Calibration

EVERY = 5  # prompts between two writes
CALIBRATION = Calibration(text="python-docs:calibration", documents="joined", samples=16, length=256)


class Clock:
    """A streamer that notes when each new token came."""

    def __init__(self):
        self.times, self.prompt = [], True

    def put(self, ids):
        """The prompt, then a token at a time."""
        if not self.prompt:
            self.times.append(time.perf_counter())
        self.prompt = False

    def end(self):
        """Nothing more comes."""

    @property
    def seconds(self):
        """From the first new token to the last."""
        return self.times[-1] - self.times[0]


def plain(model, prompt, tokens):
    """Greedy tokens one after another, and the seconds after the first of them."""
    cache, clock, fresh, answer = DynamicCache(config=model.config), Clock(), prompt[None], []  # as in `generate`
    clock.put(fresh)
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(input_ids=fresh, past_key_values=cache, logits_to_keep=1).logits
            answer.append(int(logits[0, -1].float().argmax()))
            fresh = torch.tensor([answer[-1:]])
            clock.put(fresh)
    return answer, clock.seconds


def prompts_of(options, tokenizer, config):
    """Text and prompt `[length]`, as many of each text."""
    texts = options.text.split(",")
    found = []
    for number, text in enumerate(texts):
        name, _, field = text.partition(":")
        count = options.prompts // len(texts) + (number < options.prompts % len(texts))
        section = Calibration(
            text=name, field=field or "text", documents="joined", samples=count, length=options.length, seed=1
        )
        label = Path(name).parent.name + "/" + Path(name).name
        found += [(label, ids) for ids in calibration_tokens(section, tokenizer, config)]
    return found


def row(text, prompt, dense, sparse, options, turn):
    """What one prompt comes to."""
    found = {}

    def same_layout():
        with tokens_of(sparse).dense():
            return plain(sparse, prompt, options.tokens)

    def exact():
        clock = Clock()
        answer = generate_exact(
            sparse, prompt, max_new_tokens=options.tokens, draft=options.draft, eos_token_id=(), streamer=clock
        )
        found.update({name: getattr(answer, name) for name in ("drafted", "accepted", "checks")})
        return answer.ids[0, len(prompt) :].tolist(), clock.seconds

    calls = {"dense": lambda: plain(dense, prompt, options.tokens), "same layout": same_layout, "exact": exact}
    names = list(calls)
    taken = {name: calls[name]() for name in names[turn % 3 :] + names[: turn % 3]}
    answer = taken["exact"][0]
    return {
        "text": text,
        "tokens": len(answer),
        "same": sum(a == b for a, b in zip(answer, taken["same layout"][0], strict=True)),
        "same as dense": sum(a == b for a, b in zip(answer, taken["dense"][0], strict=True)),
        **found,
        "seconds": {name: seconds for name, (_, seconds) in taken.items()},
    }


def summary(rows):
    """Over all prompts."""

    def total(key):
        return sum(each[key] for each in rows)

    def speed(name):
        return statistics.median((each["tokens"] - 1) / each["seconds"][name] for each in rows)

    return {
        "prompts": len(rows),
        "tokens": total("tokens"),
        "identical": total("same") / total("tokens"),
        "identical to dense in its own layout": total("same as dense") / total("tokens"),
        "acceptance": total("accepted") / max(total("drafted"), 1),
        "tokens per check": (total("tokens") - len(rows)) / max(total("checks"), 1),
        "tokens per second, median": {name: speed(name) for name in ("dense", "same layout", "exact")},
        "exact over dense, median": statistics.median(
            each["seconds"]["dense"] / each["seconds"]["exact"] for each in rows
        ),
    }


def main():
    """Measure what is missing, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", required=True)
    for name, default in (
        ("model", "zoo:smollm2"), ("method", "teal"), ("sites", "all"), ("prompts", 200), ("tokens", 48),
        ("length", 32), ("draft", 4), ("sparsity", 0.4),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = {name: value for name, value in vars(options).items() if name != "out"}
    known = read_json_object(options.out) if options.out.exists() else {"options": chosen, "rows": []}
    if known["options"] != chosen:
        parser.error(f"{options.out} holds other options: {known['options']}")
    tokenizer = load_tokenizer(options.model)
    dense = attach(load(options.model, dtype="bfloat16"))
    model = load(options.model, dtype="bfloat16")
    prompts = prompts_of(options, tokenizer, model.config)
    sites = options.sites.split("+") if "+" in options.sites else options.sites
    ids = calibration_tokens(CALIBRATION, tokenizer, model.config)
    fitted = sparity.with_activations(model, ids, method=options.method, sparsity=options.sparsity, sites=sites)

    def keep():
        known["summary"], known["machine"] = summary(known["rows"]), describe()
        write_json(options.out, known)

    with fitted, sparity.attached(model):
        if not known["rows"]:
            row(*prompts[0], dense, model, options, 0)  # to warm up
        for number, (text, prompt) in enumerate(prompts[len(known["rows"]) :], len(known["rows"])):
            known["rows"].append(row(text, prompt, dense, model, options, number))
            if (number + 1) % EVERY == 0 or number + 1 == len(prompts):
                keep()
    print(known["summary"])


if __name__ == "__main__":
    main()
