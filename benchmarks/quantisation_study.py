"""Whether the errors of zeros and of few bits add up: docs/studies/quantisation.md.

    python benchmarks/quantisation_study.py OUT.json [--models zoo:llama zoo:smollm2] [--rows "50 %" int4 ...]
        [--calibration FILE --text FILE]
    python benchmarks/quantisation_study.py OUT.json --table       as Markdown, what is finished

Each row is a recipe: zeros alone, few bits alone, one after the other, and both in one loop. Zeros are SparseGPT's. The
same command goes on after the rows of OUT.json.

Rows with "symmetric" and "signed" ask what the choice of a group's scale does: 2 max|w| / 15, or that or -w / 8 of its
largest weight w, whichever loses less.

Rows with "jsq" ask what JSQ's score does before 8 bits, beside Wanda's, which it rests on.
"""

from recipe_rows import main

GROUP = 32
ZEROS = {
    "50 %": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
}
BITS = {
    "int8": {"method": "nearest", "grid": {"integers": {"width": 8, "even": True}}},
    "int4": {"method": "nearest", "bits": 4, "group": GROUP, "symmetric": False},
    "gptq, 4 bits": {"method": "gptq", "bits": 4, "group": GROUP, "symmetric": False},
}
SMOOTH = {"method": "smoothquant", "where": ["norms"]}
SCALES = {
    "symmetric": {"symmetric": True},
    "signed": {"symmetric": True, "signed": True},
}
WAYS = {
    "nearest": "nearest",
    "gptq": "gptq",
    "gptq, static groups": {"gptq": {"static_groups": True}},
    "gptq, act order": {"gptq": {"act_order": True}},
    "gptq, blocks of a group": {"gptq": {"block_columns": GROUP}},
    "gptq, damping 0.1": {"gptq": {"damping": 0.1}},
}
JOINT = "gptq, 4 bits"  # what one loop does at once, in turn
SCORES = {
    "wanda": "wanda",
    "jsq": "jsq",
    "jsq, nothing clamped": {"jsq": {"clamp": 0.0}},
    "jsq, no range": {"jsq": {"rho": 0.0}},
}


def rows(options):
    """Name -> stages."""
    alone = {name: [{"prune": {"solver": "sparsegpt", **how}}] for name, how in ZEROS.items()}
    alone |= {name: [{"quantize": how}] for name, how in BITS.items()}
    both = {f"{zeros}, then {bits}": [*alone[zeros], *alone[bits]] for zeros in ZEROS for bits in BITS}
    loop = {"sparsegpt": {"bits": 4, "group": GROUP}}
    joint = {f"{zeros} and 4 bits in one loop": [{"prune": {"solver": loop, **how}}] for zeros, how in ZEROS.items()}
    return {**alone, **both, **joint, **by_scale(), **by_score()}


def by_score():
    """Name -> stages, of what JSQ's score does: alone, and before SmoothQuant's scales and 8 or 4 bits."""
    found = {}
    for name, score in SCORES.items():
        zeros, scales = {"prune": {"score": score, "sparsity": 0.5}}, {"rescale": SMOOTH}
        found[f"50 %, {name}"] = [zeros]
        for bits in ("int8", "int4"):
            found[f"50 %, {name}, then {bits}"] = [zeros, scales, {"quantize": BITS[bits]}]
    return found


def by_scale():
    """Name -> stages, of what the choice of scales does."""
    found = {}
    for scale, how in SCALES.items():
        for way, method in WAYS.items():
            options = {"method": method, "group": GROUP, "grid": {"integers": how}}
            found[f"{way}, {scale}"] = [{"quantize": options}]
        for zeros, pruned in ZEROS.items():
            loop = {"sparsegpt": {"bits": 4, "group": GROUP, **how}}
            found[f"{zeros} and 4 bits in one loop, {scale}"] = [{"prune": {"solver": loop, **pruned}}]
    return found


def table(found):
    """Rows alone, then each pair beside the sum of its parts."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in found):
        of_model = {row["row"]: row for row in found if row["model"] == model}
        dense = next(iter(of_model.values()))["dense"]
        lines += [f"`{model}`, dense {dense:.2f}", "", "| row | perplexity | KL | CPU seconds |", "|---|---|---|---|"]
        for name, row in of_model.items():
            lines.append(f"| {name} | {row['perplexity']:.2f} | {row['kl']:.4f} | {row['seconds']:.0f} |")
        lines += ["", "| zeros | bits | KL of the sum | KL one after the other | of the sum | KL in one loop |"]
        lines += ["|---|---|---|---|---|---|"]
        for zeros in ZEROS:
            for bits in BITS:
                pair = of_model.get(f"{zeros}, then {bits}")
                if pair is None or zeros not in of_model or bits not in of_model:
                    continue
                parts = of_model[zeros]["kl"] + of_model[bits]["kl"]
                joint = of_model.get(f"{zeros} and 4 bits in one loop") if bits == JOINT else None
                lines.append(
                    f"| {zeros} | {bits} | {parts:.4f} | {pair['kl']:.4f} | {pair['kl'] / parts:.2f} | "
                    f"{'' if joint is None else format(joint['kl'], '.4f')} |"
                )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, rows, table)
