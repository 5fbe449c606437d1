"""Random mixes of requests: is each answer, bit for bit, that of the same request alone?

    python benchmarks/serving_mixes.py OUT.json [--model zoo:llama] [--mixes 10000] [--each 50] [--seconds S] [--seed 0]
        [--forms dense,bitmask,int8,teal] [--orders 400] [--only BATCH]

A mix is 2 to 6 requests with random prompts, lengths, ways of sampling, stop strings and logprobs, the steps at which
each joins, and for one in four the step at which its client leaves. `--each` mixes are a batch: one after another they
run on one scheduler with a random number of slots, of tokens in a step and of blocks for known beginnings, so that an
answer has to be right whatever earlier mixes left behind. Compared are tokens, text, logprobs of answer and prompt,
and why it ended. The answer alone comes from one slot and no known beginnings, for one in four token by token.

Batches take turns on the model as it is (`dense`), with half of its weights zero (`bitmask`), with quantised weights
(`int8`), and with activations that are skipped (`teal`). OUT.json is written after every batch, and the same command
goes on behind the last one, also to a larger --mixes. A request that differs is told with its batch; `--only` runs that
one again. Nothing is timed here: the benchmark may share the machine.
"""

import argparse
import random
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch

import sparity
from sparity.files import read_json_object, write_json
from sparity.measure.data.machine import describe
from sparity.models.loading import load, load_tokenizer
from sparity.serve.execution.steps import Steps
from sparity.serve.prefixes import BLOCK, Prefixes
from sparity.serve.sampling import Sampling
from sparity.serve.scheduler import Scheduler, run_to_end
from sparity.serve.sequence import Answer, Order, texts_of
from sparity.serve.served_model import ends_of

CONTEXT = 192
COMMON = ["e", "th", "\n", " a", "ing", "er the", "zq"]  # stop strings, most of which do come
SHOWN = 5  # differences that are told in full


class Subject:
    """A model that is served, and what it answers each order alone.

    Args:
        name: of the form, or `teal`.
        path: of the model.
        closing: takes what has to be undone in the end.
        orders: how many different ones there are.
    """

    def __init__(self, name, path, closing, orders):
        model, self.tokenizer = load(path, dtype="bfloat16"), load_tokenizer(path)
        self.ends, self.vocabulary = ends_of(model, self.tokenizer), model.get_input_embeddings().num_embeddings
        if name == "bitmask":
            for block in model.base_model.layers:
                for weight in [one.weight.data for one in block.modules() if isinstance(one, torch.nn.Linear)]:
                    weight[weight.abs() <= weight.abs().float().median()] = 0
        if name == "teal":
            text = torch.randint(0, self.vocabulary, (4, 64), generator=torch.Generator().manual_seed(0))
            sparse = sparity.with_activations(model, text, method="teal", sparsity=0.5, prompt="sparse", first=2)
            model = closing.enter_context(sparse)
        form, values = ("bitmask", "same") if name == "bitmask" else ("dense", "int8" if name == "int8" else "same")
        self.model = sparity.attach(model, **({} if name == "teal" else {"form": form, "values": values}))
        self.orders, self._alone = orders, {}

    def answer(self, order):
        """An answer that is not begun, and the list of its pieces."""
        pieces = []
        return Answer(order, self.tokenizer, self.ends, pieces.append), pieces

    def alone(self, number):
        """The outcome of an order that nothing comes with."""
        if number not in self._alone:
            answer, pieces = self.answer(order_of(number, self.vocabulary))
            run_to_end(Scheduler(Steps(self.model, 1, CONTEXT, 32 if number % 4 else 1)), [answer])
            self._alone[number] = outcome(answer, pieces)
        return self._alone[number]


def order_of(number, vocabulary):
    """The order of a number; prompts begin in one of three ways."""
    draw = random.Random(f"order {number}")
    start = random.Random(f"start {draw.randrange(3)}")
    longest = draw.choice([20, 20, 150])
    prompt = [start.randrange(vocabulary) for _ in range(draw.randint(1, longest))]
    prompt += [draw.randrange(vocabulary) for _ in range(draw.randint(0, 4))]
    sampling = Sampling(
        temperature=draw.choice([0.0, 0.0, 0.7, 1.0, 2.0]),
        top_p=draw.choice([1.0, 1.0, 0.8]),
        top_k=draw.choice([0, 0, 20]),
        min_p=draw.choice([0.0, 0.0, 0.05]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
        presence_penalty=draw.choice([0.0, 0.0, 0.5]),
        frequency_penalty=draw.choice([0.0, 0.0, 0.5]),
        logit_bias=draw.choice([(), (), ((draw.randrange(vocabulary), 8.0),)]),
        seed=draw.randrange(2**64),
    )
    scored = draw.random() < 0.1
    return Order(
        prompt=tuple(prompt),
        sampling=sampling,
        most=draw.randint(0, 1) if scored else draw.randint(1, 9),
        least=draw.randint(0, 3),
        stop=tuple(draw.sample(COMMON, draw.choice([0, 1, 2, 3]))),
        stop_kept=draw.random() < 0.5,
        ignore_end=draw.random() < 0.7,
        logprobs=draw.choice([None, 0, 3]),
        prompt_logprobs=2 if scored else draw.choice([None, None, None, 1]),
        scored=scored,
    )


def outcome(answer, pieces):
    """All that can be told of an answer, numbers by their bits."""
    tokens = [token for piece in pieces for token in piece.tokens]
    return answer.ids, texts_of(pieces), tokens, answer.prompt_tokens, pieces[-1].finish if pieces else None


def mix(draw, orders):
    """Of each request the step at which it joins, its order, and the step at which its client leaves, if it does."""
    return [
        (draw.randint(0, 9), draw.randrange(orders), draw.randint(1, 12) if draw.random() < 0.25 else None)
        for _ in range(draw.randint(2, 6))
    ]


def together(scheduler, subject, asked):
    """Run a mix to its end -> of each request its order's number, answer and pieces, and whether its client left."""
    requests = [(*one, *subject.answer(order_of(one[1], subject.vocabulary))) for one in asked]
    coming, gone, step = sorted(requests, key=lambda one: one[0]), [], 0
    while coming or scheduler.waiting or scheduler.running:
        while coming and coming[0][0] <= step:
            scheduler.submit(coming.pop(0)[3])
        for joins, _, leaves, answer, _ in requests:
            if leaves is not None and joins + leaves == step and answer.finish is None:
                scheduler.cancel(answer)
                gone.append(answer)
        scheduler.step()
        step += 1
    return [(number, answer, pieces, answer in gone) for _, number, _, answer, pieces in requests]


def batch(subject, name, mixes):
    """Some mixes one after another on one scheduler: what was counted, and what differs."""
    draw, seen, different = random.Random(name), Counter(), []
    slots = draw.choice([1, 2, 3, 4, 6])
    execution = Steps(subject.model, slots, CONTEXT, draw.randint(slots, draw.choice([8, 32, 64])))
    blocks = draw.choice([0, 2, 6, 40])
    scheduler = Scheduler(execution, Prefixes(execution, blocks * execution.block_bytes(BLOCK)) if blocks else None)
    for at in range(mixes):
        asked = mix(draw, subject.orders)
        for number, answer, pieces, left in together(scheduler, subject, asked):
            seen.update(requests=1, left=left, reused_tokens=answer.reused, computed_tokens=len(answer.ids))
            if left:
                continue
            seen.update(compared=1, drawn=answer.order.sampling.temperature > 0, tokens=answer.made)
            seen[f"ended by {answer.finish}"] += 1
            found, wanted = outcome(answer, pieces), subject.alone(number)
            if found != wanted or answer.finish == "error":
                different.append({"mix": at, "asked": asked, "order": number, "together": found, "alone": wanted})
    seen["mixes"] = mixes
    return {
        "counts": dict(seen),
        "slots": slots,
        "step_tokens": execution.most,
        "blocks": blocks,
        "different": different,
    }


def summary(batches):
    """What all batches come to."""
    counts, different = Counter(), [one for each in batches for one in each["different"]]
    for each in batches:
        counts.update(each["counts"])
    return {**counts, "different": len(different), "first_different": different[:SHOWN]}


def go_on(path, settings):
    """The batches that a file has of the same settings.

    Raises:
        SystemExit: it has other settings.
    """
    if path is None or not path.exists():
        return []
    found = read_json_object(path)
    if found["settings"] != settings:
        raise SystemExit(f"{path} is of other settings: {found['settings']}; name another file")
    return found["batches"]


def main():
    """Run, compare and write JSON; the exit code is 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--model", default="zoo:llama")
    parser.add_argument("--forms", default="dense,bitmask,int8,teal")
    for name, default in (("mixes", 10_000), ("each", 50), ("seed", 0), ("orders", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("model", "forms", "each", "seed", "orders")}
    names, begun = options.forms.split(","), time.monotonic()
    batches = go_on(options.out, settings) if options.only is None else []
    todo = range(len(batches), -(-options.mixes // options.each)) if options.only is None else [options.only]
    with ExitStack() as closing:
        subjects = {name: Subject(name, options.model, closing, options.orders) for name in names}
        for index in todo:
            if time.monotonic() - begun > options.seconds:
                break
            form = names[index % len(names)]
            batches.append({"form": form, **batch(subjects[form], f"{options.seed} {index}", options.each)})
            found = summary(batches)
            words = f"batch {index}: {found['mixes']} mixes, {found['compared']} compared, {found['different']} differ"
            print(f"{words}; {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
            if options.out and options.only is None:
                command = " ".join(["python", "benchmarks/serving_mixes.py", *sys.argv[1:]])
                content = {"command": command, "machine": describe(), "settings": settings, "summary": found}
                write_json(options.out, {**content, "batches": batches})
    print(summary(batches))
    return int(bool(summary(batches)["different"]))


if __name__ == "__main__":
    sys.exit(main())
