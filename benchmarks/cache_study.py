"""Recall against what a key-value cache keeps, for every policy: the rows of docs/studies/cache.md.

    python benchmarks/cache_study.py OUT.json [--models zoo:relu ...] [--keeps 0.5 0.25] [--policies snapkv ...]
    python benchmarks/cache_study.py OUT.json --table       as Markdown, what is finished

A context of --length tokens is read, what the policy does not keep goes, and then each question is put to what is left;
`query_aware` rows read the question with the context. Suites: copies of random tokens, one pass key and four in a
passage of --filler. The whole cache, random tokens and nothing but the protected ones are always rows. Each row is
written when it is finished, and the same command goes on after the rows of OUT.json.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch

import sparity
from sparity.calibration.text import read_documents
from sparity.dynamic.cache.functions import policy_of
from sparity.errors import SparityError
from sparity.files import read_json_object, write_json
from sparity.measure.data.machine import describe
from sparity.models.loading import load, load_tokenizer
from sparity.quality.recall import recall
from sparity.quality.recall_suites import copies, pass_keys

SUITES = ("copies", "pass key", "four pass keys")
POLICIES = (
    *(
        "streaming_llm",
        "h2o",
        "tova",
        "snapkv",
        "pyramidkv",
        "adakv",
        "criticalkv",
        "defensivekv",
        "expected_attention",
    ),
    *("keydiff", "knorm", "lagkv", "quest", "pqcache", "razorattention", "lazyllm_static", "lazyllm"),
    *("kvzip", "kvzap", "duoattention", "triattention"),
)
SMALL = {
    "lagkv": {"lag": 64},
    "razorattention": {"window": 64, "tokens": 128},
    "quest": {"dense": 0},
    "kvzap": {"window": 16},
    "duoattention": {"window": 64},
    "triattention": {"window": 16},
}
AHEAD, LEVELS = 24, (1, 2, 4, 8, 16)  # by which budgets are measured
KIVI = {"kivi": {"bits": 4, "residual": 32}}
MERGED = {
    "minicache": {},
    "minicache, retain 0.5": {"retain": 0.5},
    "minicache, all layers": {"start": 0.0},
}


def requests(policies, keeps):
    """Name of a row -> policy, share, more options, and whether the question is read with the context."""
    found = {"keep_all": ("keep_all", 1.0, {}, False), "drop_all": ("drop_all", 0.1, {}, False)}
    for bits in (8, 4, 2):
        found[f"kivi, {bits} bits"] = ({"kivi": {"bits": bits, "residual": 32}}, 1.0, {}, False)
    for row, own in MERGED.items():
        found[row] = ({"minicache": own}, 1.0, {}, False)
    for keep in keeps:
        for name in ("random", *policies):
            policy = {name: SMALL.get(name, {})}
            found[f"{name}, {keep:g}"] = (policy, keep, {}, False)
        for by in ("block", "head") if "snapkv" in policies else ():
            found[f"snapkv by {by}, {keep:g}"] = ("snapkv", keep, {"by": by}, False)
        if "snapkv" in policies:
            found[f"snapkv and kivi, {keep:g}"] = ("snapkv", keep, {"store": KIVI}, False)
        for name in (each for each in ("snapkv", "lazyllm_static", "lazyllm") if each in policies):
            found[f"{name}, {keep:g}, query_aware"] = (name, keep, {}, True)
    return found


def suites_of(name, model, options):
    """The suites of a model, by name."""
    tokenizer = load_tokenizer(name)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    filler = encode(" ".join(read_documents(options.filler))[: 8 * 20 * options.length])
    length, count = options.length, options.count
    return {
        "copies": copies(model.config.vocab_size, length=length, count=count),
        "pass key": pass_keys(encode, filler, length=length, count=count),
        "four pass keys": pass_keys(encode, filler, length=length, keys=4, count=max(count // 4, 1), seed=1),
    }


def learned_of(model, tokenizer, policy):
    """What a policy learns of the model from calibration text, 32 stretches of 128 tokens; None = nothing."""
    if not policy_of(policy).reads_text:
        return None
    return sparity.calibrate_cache(model, stretches(tokenizer, 32, 128), policy=policy)


def budgets_of(model, tokenizer, keep, by, length):
    """Shares of blocks or heads for SnapKV, by their cost on 8 stretches of calibration text, each 24 tokens longer."""
    texts = stretches(tokenizer, 8, length + AHEAD)
    return sparity.cache_budgets(model, texts, policy="snapkv", keep=keep, by=by, ahead=AHEAD, levels=LEVELS)


def stretches(tokenizer, count, length):
    """Token ids of calibration text, `[count, length]`."""
    text = " ".join(read_documents("python-docs:calibration"))[: count * length * 20]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: count * length]
    return torch.tensor(ids).view(count, length)


def measure(options):
    """Every row that OUT.json lacks."""
    path = Path(options.out)
    done = read_json_object(path) if path.exists() else {"machine": plain_machine(), "rows": []}
    for name in options.models:
        model = load(name, dtype="float32")
        suites = suites_of(name, model, options)
        bounds = [options.length // 4, options.length // 2, options.length + 1]
        for row, (policy, keep, more, aware) in requests(options.policies, options.keeps).items():
            if any(each["model"] == name and each["row"] == row for each in done["rows"]):
                continue
            found = {"model": name, "row": row, "length": options.length, "count": options.count, "suites": {}}
            start = time.process_time()
            try:
                if by := more.pop("by", None):
                    keep = budgets_of(model, load_tokenizer(name), keep, by, options.length)
                learned = learned_of(model, load_tokenizer(name), policy)
                more = {**more, "learned": learned}
                with nullcontext() if row == "keep_all" else sparity.cache(model, policy, keep, **more):
                    for suite, contexts in suites.items():
                        given = recall(model, contexts, query_aware=aware)
                        found["suites"][suite] = {
                            "share": given.share,
                            "loss": given.loss,
                            "bytes": given.nbytes,
                            "by_distance": given.by_distance(bounds),
                        }
            except SparityError as error:
                found["refused"] = str(error)
            found["cpu_seconds"] = time.process_time() - start
            done["rows"].append(found)
            write_json(path, done)
    return done


def plain_machine():
    """The machine, as JSON."""
    from sparity.measure.data.report import plain

    return plain(describe())


def table(done):
    """Markdown: one table per model, rows below random of the same share marked with an asterisk."""
    for model in dict.fromkeys(row["model"] for row in done["rows"]):
        rows = {row["row"]: row for row in done["rows"] if row["model"] == model}
        whole = rows["keep_all"]["suites"]
        print(
            f"\n`{model}`\n\n| | "
            + " | ".join(SUITES)
            + " | bytes of the whole cache |\n|"
            + "---|" * (len(SUITES) + 2)
        )
        for name, row in rows.items():
            if "refused" in row:
                print(f"| {name} | refused: {row['refused']} |" + " |" * len(SUITES))
                continue
            parts = name.split(", ")
            control = rows.get(f"random, {parts[1]}") if len(parts) > 1 and not parts[0].startswith("kivi") else None
            cells = []
            for suite in SUITES:
                share = row["suites"][suite]["share"]
                under = control is not None and share < control["suites"][suite]["share"]
                cells.append(f"{100 * share:.0f} %{'*' if under else ''}")
            nbytes = sum(row["suites"][suite]["bytes"] for suite in SUITES) / sum(
                whole[suite]["bytes"] for suite in SUITES
            )
            print(f"| {name} | " + " | ".join(cells) + f" | {nbytes:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--models", nargs="+", default=["zoo:relu", "zoo:smollm2"])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--filler", default="python-docs:held-out")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    table(read_json_object(Path(options.out)) if options.table else measure(options))


if __name__ == "__main__":
    main()
