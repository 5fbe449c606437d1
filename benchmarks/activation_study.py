"""Quality against skipped activations, for every method and budget: the rows of docs/studies/activations.md.

    python benchmarks/activation_study.py OUT.json --texts NAME=TEXT ... [--models zoo:relu ...] [--parts methods ...]
    python benchmarks/activation_study.py OUT.json --table       as Markdown, what is finished
    python benchmarks/activation_study.py OUT.json --draw FOLDER   the plots

Methods are fitted to --samples windows of --length tokens of --calibration; the budgets that measure do so on the first
of these. Every text is measured on --windows windows of 512 tokens, each of which starts as a text of its own and stays
dense in its first four tokens. Parts: `methods` at five sparsities, `budgets` and `plan` (each strategy of the research
plan alone, and all). Each row is written when it is finished, and the same command goes on after the rows of OUT.json.
"""

import argparse
import statistics
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from held_windows import Texts, change, mean

import sparity
from sparity.calibration.text import read_documents
from sparity.calibration.tokens import Windows, draw_windows
from sparity.dynamic.activations.places import places_of
from sparity.engine.modules.skips import InputSkip, output_skip_of, skip_of
from sparity.errors import SparityError
from sparity.files import read_json_object, write_json
from sparity.measure.charts.lines_matrix import Line, line_plot
from sparity.measure.charts.picture import picture
from sparity.measure.data.machine import describe
from sparity.measure.data.report import plain
from sparity.measure.show import numbers
from sparity.models.attached_runtime import input_sites
from sparity.models.loading import load, load_tokenizer
from sparity.quality.perplexity import exp

MODELS = ("zoo:smollm2", "zoo:relu", "zoo:llama")
FIRST = 4
LEVELS = (0.25, 0.4, 0.5, 0.65, 0.8)
COMPOSED = {"importance": "weight_norm", "power": 0.5, "centre": "median"}
METHODS = {  # name: method, options, sites
    "teal": ("teal", {}, "all"),
    "rms": ("rms", {}, "all"),
    "statistical_topk": ("statistical_topk", {}, "all"),
    "wina": ("wina", {}, "all"),
    "scap": ("scap", {"centre": "mode"}, "all"),
    "thresholds": ("thresholds", COMPOSED, "all"),
    "r_sparse": ("r_sparse", {}, "all"),
    "larosa": ("larosa", {}, "all"),
    "teal, hidden": ("teal", {}, "hidden"),
    "cats": ("cats", {}, "gate_output"),
    "chess": ("chess", {}, "gate_output"),
    "dejavu": ("dejavu", {}, "neurons"),
}
FEW = ("statistical_topk", "wina", "scap", "r_sparse", "rms", "dejavu")  # at one sparsity only where a model is large
BUDGETS = {
    "log_depth": {"log_depth": {"first": 0.4, "last": 0.6}},
    "block_greedy": {"block_greedy": {"step": 0.1, "samples": 2}},
    "knapsack": {"knapsack": {"step": 0.1, "spread": 0.2, "samples": 2}},
    "knapsack, per role": {"knapsack": {"step": 0.1, "spread": 0.3, "per": "role", "samples": 2}},
    "knapsack, separable": {"knapsack": {"step": 0.1, "spread": 0.3, "separable": True, "samples": 2}},
    "evopress": {"evopress": {"step": 0.1, "spread": 0.2, "samples": 4, "generations": 10}},
}
COARSE = {  # where a model is large: fewer measurements
    "knapsack": {"knapsack": {"step": 0.2, "spread": 0.2, "samples": 1}},
    "evopress": {"evopress": {"step": 0.1, "spread": 0.2, "per": "block", "samples": 1, "generations": 8}},
}
LOG_DEPTH = BUDGETS["log_depth"]
PLAN = {
    "one threshold (TEAL)": ("teal", "uniform"),
    "1a, quantile of each token": ("plan_quantile", "uniform"),
    "1b, learned scale": ("plan_predictor", "uniform"),
    "2, weighed by column norms": ("plan_importance", "uniform"),
    "3, log law over depth": ("teal", LOG_DEPTH),
    "2 and 3, the plan": ("plan_importance", LOG_DEPTH),
}


def wanted(model, parts, small):
    """The rows of a model: (part, name, sparsity, what `with_activations` is asked for)."""
    if "methods" in parts:
        for name, (method, options, sites) in METHODS.items():
            if name == "dejavu" and model != "zoo:relu":
                continue
            for level in (0.5,) if name in FEW and not small else LEVELS:
                yield "methods", name, level, {"method": method, "sites": sites, **options}
    if "budgets" in parts:
        for name, budget in (BUDGETS if small else BUDGETS | COARSE).items():
            yield "budgets", name, 0.5, {"method": "teal", "sites": "all", "budget": budget}
    if "plan" in parts:
        for name, (method, budget) in PLAN.items():
            for level in (0.5, 0.8):
                yield "plan", name, level, {"method": method, "sites": "hidden", "budget": budget}


def measure(texts, model, sites):
    """For each text, for each window, what `Texts.measured` gives, and the share skipped."""
    found = {name: [] for name in texts.windows}
    with skipped_share(model, sites) as share:
        for name, window in texts.measured(model):
            found[name].append({**window, "skipped": sum(share) if share else None})
            share.clear()
    return found


@contextmanager
def skipped_share(model, sites):
    """Within the context a list to which each place adds the share of all places' weights that its tokens skip.

    It stays empty where a method is more than a rule for each place.
    """
    seen, places = [], places_of(model, input_sites(model), sites)
    total = sum(place.cost for place in places)
    hooks = [hook for place in places for hook in place.module._forward_pre_hooks.values()]
    with ExitStack() as open_:

        def count(skip, x, weights):
            keep = skip.rule.like(x).keep(x)[:, FIRST:].float().mean()
            seen.append(float(1 - keep) * weights / total)

        for place in places if all(type(hook) is InputSkip for hook in hooks) else ():
            if skip := skip_of(place.module):
                hook = lambda _, given, skip=skip, cost=place.cost: count(skip, given[0], cost)  # noqa: E731
                open_.callback(place.module.register_forward_pre_hook(hook, prepend=True).remove)
            if skip := output_skip_of(place.module):
                hook = lambda _, given, output, skip=skip, cost=place.cost: count(skip, output, cost)  # noqa: E731
                open_.callback(place.module.register_forward_hook(hook, prepend=True).remove)
        yield seen


def run(known, options, keep):
    """Measure what is missing, model after model."""
    for name in options.models:
        model, tokenizer = load(name, dtype="bfloat16"), load_tokenizer(name)
        drawn = Windows(options.samples, options.length, documents="joined")
        ids = draw_windows(read_documents(options.calibration), tokenizer, drawn)
        small = model.num_parameters() < 2e7
        texts = None
        for part, row, level, asked in wanted(name, options.parts, small):
            if (options.rows and row not in options.rows) or level not in options.sparsities:
                continue
            if any((r["model"], r["part"], r["row"], r["sparsity"]) == (name, part, row, level) for r in known["rows"]):
                continue
            texts = texts or Texts(model, tokenizer, options.texts, options.windows)
            begun = time.monotonic()
            try:
                with sparity.with_activations(model, ids, sparsity=level, **asked) as sparse:
                    fitted = time.monotonic() - begun
                    found = {"texts": measure(texts, sparse, asked["sites"])}
            except SparityError as error:
                fitted, found = 0.0, {"refused": str(error)}
            known["rows"].append(
                {"model": name, "part": part, "row": row, "sparsity": level, "fit_seconds": fitted, **found}
            )
            keep()
            print(f"{name}, {part}, {row}, {level}: {found.get('refused') or summary(known['rows'][-1])}", flush=True)


def summary(row):
    """The texts of a row in words."""
    return "; ".join(f"{name} {cell(windows)}" for name, windows in row["texts"].items())


def cell(windows):
    """Perplexity, its change, and KL."""
    return f"{exp(mean(windows, 'loss')):.2f} ({numbers.change(change(windows))}, {mean(windows, 'kl'):.3f})"


def tables(known):
    """The rows as Markdown: one table for each model and part."""
    lines = []
    finished = [row for row in known["rows"] if "texts" in row]
    for model, part in dict.fromkeys((row["model"], row["part"]) for row in finished):
        rows = [row for row in finished if (row["model"], row["part"]) == (model, part)]
        names = list(rows[0]["texts"])
        dense = ", ".join(f"{n} {exp(mean(rows[0]['texts'][n], 'dense_loss')):.2f}" for n in names)
        lines += [
            f"**`{model}`, {part}**; dense: {dense}",
            "",
            f"| {part} | asked | {' | '.join(names)} | same top-1 | skipped |",
            f"|---|---|{'---|' * (len(names) + 2)}",
        ]
        for row in rows:
            every = [window for windows in row["texts"].values() for window in windows]
            skipped = [mean(windows, "skipped") for windows in row["texts"].values()]
            ends = "" if None in skipped else f"{numbers.percent(min(skipped))} to {numbers.percent(max(skipped))}"
            lines.append(
                f"| {row['row']} | {numbers.percent(row['sparsity'])} | "
                f"{' | '.join(cell(row['texts'][name]) for name in names)} | "
                f"{numbers.percent(mean(every, 'top1'))} | {ends} |"
            )
        lines.append("")
    lines += [f"- {r['model']}, {r['row']}: {r['refused']}" for r in known["rows"] if "refused" in r]
    return "\n".join(lines)


def draw(known, folder):
    """A plot for each model: KL, the mean over the texts, against the sparsity, of the methods at several."""
    for model in dict.fromkeys(row["model"] for row in known["rows"]):
        lines = []
        for name in METHODS:
            points = {
                row["sparsity"]: statistics.fmean(mean(windows, "kl") for windows in row["texts"].values())
                for row in known["rows"]
                if (row["model"], row["part"], row["row"]) == (model, "methods", name) and "texts" in row
            }
            if len(points) > 1:
                lines.append(Line(name, points))
        if lines:
            title = f"{model}: KL from dense, mean of the texts"
            chart = line_plot(title, lines, "share that is skipped where a method skips", "KL, nats", "{:.3g}".format)
            (folder / f"activations-{model.removeprefix('zoo:')}.svg").write_text(picture([(title, chart)]))


def main():
    """Run what is missing, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--parts", nargs="+", default=("methods", "plan", "budgets"))
    parser.add_argument("--rows", nargs="+", help="these only")
    parser.add_argument("--sparsities", nargs="+", type=float, default=LEVELS, help="these only")
    parser.add_argument("--texts", nargs="+", default=["docs=python-docs:held-out"], metavar="NAME=TEXT")
    parser.add_argument("--calibration", default="python-docs:calibration")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--draw", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    options.texts = dict(text.split("=", 1) for text in options.texts)
    known = read_json_object(options.out) if options.out.exists() else {"machine": describe(), "rows": []}
    if options.table:
        print(tables(known))
    elif options.draw:
        draw(known, options.draw)
    else:
        run(known, options, lambda: write_json(options.out, plain(known)))


if __name__ == "__main__":
    main()
