"""The runs of recipes/sweeps/smollm2.yaml, and what each pruned model writes: perplexity beside text.

    python benchmarks/smollm2.py OUT.json [KEY=VALUE ...]
    python benchmarks/smollm2.py OUT.json --table      as Markdown, what is finished

KEY=VALUE changes the sweep as on the command line of `sparity sweep`. Each row is written when it is finished, and the
same command goes on after the rows that OUT.json has. The text is greedy, in the model's chat template.
"""

import argparse
from pathlib import Path

from sparity.cli.console import ProgressBar
from sparity.files import read_json_object, write_json
from sparity.measure.data.machine import describe
from sparity.measure.data.report import plain
from sparity.measure.data.sweep_report import Row
from sparity.measure.show import numbers
from sparity.measure.show.sentences import describe_answer
from sparity.measure.timing.answers import answers
from sparity.models.loading import load, load_tokenizer
from sparity.pipeline.run.runner import execute
from sparity.sweep_file import Sweep

SWEEP = Path(__file__).parents[1] / "recipes/sweeps/smollm2.yaml"
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about a lighthouse in a storm.",
    "Why does ice float on water?",
)
TOKENS = 40


def table(known):
    """The rows as Markdown, dense first, then by sparsity and perplexity; the answers below."""
    rows = sorted(known["rows"], key=lambda row: (row["labels"][0], row["quality"][0]["perplexity"]))
    lines = [
        "| sparsity | method | zeros | perplexity | change | KL | same top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    if rows:
        lines.append(f"| | dense | 0 % | {rows[0]['quality'][0]['dense_perplexity']:.2f} | | | |")
    for row in rows:
        found = row["quality"][0]
        lines.append(
            f"| {row['labels'][0]} | {row['labels'][1]} | {numbers.percent(row['sparsity'])} | "
            f"{found['perplexity']:.2f} | {numbers.change(found['change'])} | {found['kl']:.3f} | "
            f"{numbers.percent(found['top1'])} |"
        )
    for prompt in PROMPTS:
        lines += ["", f"**{prompt}**", "", f"- dense: {known['dense'][prompt]}"]
        lines += [f"- {', '.join(reversed(row['labels']))}: {describe_answer(row['says'][prompt])}" for row in rows]
    return "\n".join(lines)


def main():
    """Run what is missing, in the sweep's order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(read_json_object(options.out)))
        return
    sweep = Sweep.read(SWEEP, options.changes)
    tokenizer = load_tokenizer(sweep.base.model)
    known = (
        read_json_object(options.out) if options.out.exists() else {"machine": describe(), "dense": None, "rows": []}
    )

    def keep():
        write_json(options.out, plain(known))

    if known["dense"] is None:
        known["dense"] = answers(load(sweep.base.model, dtype=sweep.base.dtype), tokenizer, PROMPTS, TOKENS)
        keep()
    with ProgressBar(quiet=False) as progress:
        for combination in sweep.combinations:
            if any(row["labels"] == list(combination.labels) for row in known["rows"]):
                continue
            progress.phase(combination.words)
            result = execute(combination.recipe, progress)
            row = Row.of(combination.labels, plain(combination.recipe.summary()), result.report).to_dict()
            row["labels"] = list(combination.labels)
            known["rows"].append({**row, "says": answers(result.model(), tokenizer, PROMPTS, TOKENS)})
            keep()


if __name__ == "__main__":
    main()
