"""Sparsity that comes about in training, beside the dense model after the same steps: docs/studies/training.md.

    python benchmarks/training_study.py OUT.json [--steps 50] [--samples 32] [--length 128]
    python benchmarks/training_study.py OUT.json --table       as Markdown, what is finished

Each row is a recipe, written when it is finished; the same command goes on after the rows of OUT.json.
"""

from recipe_rows import main

RATE = 1e-3
MARKS = (1, 0.1, 0.2, 0.5, 1.0)  # the first step, then shares of the course
ROUNDS = 2
TWO_OF_FOUR = {"prune": {"score": "magnitude", "pattern": "2:4"}}
HALF = {"prune": {"score": "magnitude", "sparsity": 0.5}}


def rows(options):
    """Name -> stages: what is trained for `steps`, each round of a lottery too."""

    def train(method, **more):
        name = {method: more} if more else method
        return [{"sparse_training": {"method": name, "steps": options.steps, "rate": RATE}}]

    def ticket(**more):
        return train("lottery", rounds=ROUNDS, **more)

    lora = {"heal": {"method": {"lora": {"steps": options.steps, "rate": 5e-3}}, "guard": False}}
    return {
        "dense, trained as long": train("asp", kept=4),
        "2:4 by magnitude, not trained": [TWO_OF_FOUR],
        "2:4, asp": train("asp"),
        "2:4, sr_ste": train("sr_ste"),
        "2:4, learned_mask, weights as they were": train("learned_mask"),
        "2:4 by magnitude, lora in the mask": [TWO_OF_FOUR, lora],
        "50 % by magnitude, not trained": [HALF],
        "50 %, lottery, rewound": ticket(),
        "50 %, lottery, kept": ticket(ticket="kept"),
        "50 %, lottery, random again": ticket(ticket="random"),
        "from scratch: dense": train("lottery", rounds=1, sparsity=0.0, start="random"),
        "from scratch: 50 %, rewound": ticket(start="random"),
        "from scratch: 50 %, random again": ticket(start="random", ticket="random"),
    }


def table(found):
    """The last course of every row: perplexity, KL and some losses of its curve."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in found):
        of_model = [row for row in found if row["model"] == model]
        lines += [f"`{model}`, dense {of_model[0]['dense']:.2f}", ""]
        lines += ["| row | zeros | perplexity | KL | loss of the last course, from its first step | CPU seconds |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in of_model:
            course = list(list(row["curves"].values())[-1].items()) if row["curves"] else []
            places = dict.fromkeys(max(int(mark * len(course)), 1) - 1 if mark != 1 else 0 for mark in MARKS[:-1])
            marks = [course[place] for place in (*places, -1)] if course else []
            curve = ", ".join(f"{step}: {loss:.2f}" for step, loss in dict(marks).items())
            lines.append(
                f"| {row['row']} | {row['zeros']:.0%} | {row['perplexity']:.2f} | {row['kl']:.3f} | {curve} | "
                f"{row['seconds']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, rows, table)
