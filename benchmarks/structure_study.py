"""Smaller models by every method of structured pruning, beside the dense one: the rows of docs/studies/structure.md.

    python benchmarks/structure_study.py OUT.json [--models zoo:llama ...] [--parts methods healed] [--rows flap ...]
    python benchmarks/structure_study.py OUT.json --table       as Markdown, what is finished
    python benchmarks/structure_study.py OUT.json --draw FOLDER   the plots

Part `methods`: the share that each method is asked for is set so that what it takes off the weights of all blocks comes
nearest to 10, 20 and 30 %; where it cannot come within 5 points there is no row. Calibrated on --samples windows of
--length tokens of --calibration (where a model is large the slow ones on fewer, and at 20 % alone); measured on
--windows windows of 512 tokens. Every result that a stock configuration can say is saved, opened by stock transformers
and compared.

Part `healed`: 20 % by recipes that heal afterwards (few where a model is large), and 2:4 with a low rank. Each row is
written when it is finished, and the same command goes on after the rows of OUT.json.
"""

import argparse
import tempfile
import time
from pathlib import Path

import recipe_rows
import torch
from held_windows import Texts, change, mean
from structure_rows import HEAL, HEALED, HEALED_LARGE, METHODS, OF_EXPERTS, SLOW, sparsity_for
from transformers import AutoModelForCausalLM

import sparity
from sparity.calibration.text import read_documents
from sparity.calibration.tokens import Windows, draw_windows
from sparity.errors import SparityError
from sparity.files import read_json_object, write_json
from sparity.measure.charts.lines_matrix import Line, line_plot
from sparity.measure.charts.picture import picture
from sparity.measure.data.machine import describe
from sparity.measure.data.report import plain
from sparity.measure.show import numbers
from sparity.models.cuts.whole import blocks_of, ragged_problem, stock_problem
from sparity.models.families.base import family_of
from sparity.models.loading import load, load_tokenizer
from sparity.models.model_parts import ATTENTION
from sparity.quality.perplexity import exp, window_logits
from sparity.static.structure.subject import Subject

MODELS = ("zoo:llama", "zoo:moe", "zoo:smollm2")
SHARES = (0.1, 0.2, 0.3)
TARGET = 1.3  # times the dense perplexity, at 20 % and without backpropagation
LARGE = 2e7  # parameters of a model on which slow methods see less
CHECKED = 64  # tokens on which the reopened model is compared


def sizes_of(model, dense):
    """The share of the dense blocks' weights that is gone, and that of attentions which are silent but stored."""
    family = family_of(model.config)
    stored, before = (
        sum(p.numel() for p in m.get_submodule(family.blocks).parameters() if p.ndim > 1) for m in (model, dense)
    )
    silent = 0
    for block in blocks_of(model, family) if stock_problem(model) is None else ():
        parts = [projection for projection in block.projections if projection.role in ATTENTION]
        if any(projection.role == "o" and not projection.weight.any() for projection in parts):
            silent += sum(projection.weight.numel() for projection in parts)
    return {"removed": 1 - stored / before, "silent": silent / before}


def opens_in(model):
    """Who opens the model when it is saved: stock transformers (tried, the same logits), Sparity, or nobody."""
    if stock_problem(model) is not None:
        return "in memory" if ragged_problem(model) else "sparity.load"
    ids = torch.arange(CHECKED)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        opened, found = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    same = torch.equal(window_logits(opened, ids), window_logits(model, ids))
    return "transformers" if same and not any(found.values()) else "transformers, but not the same model"


def run_methods(known, options, keep):
    """Measure what is missing of `methods`, model after model."""
    for name in options.models:
        model, tokenizer = load(name, dtype="float32"), load_tokenizer(name)
        large, subject, texts = model.num_parameters() > LARGE, Subject(model, None), None
        documents = read_documents(options.calibration)
        for share in options.shares:
            for row, asked in (OF_EXPERTS if name == "zoo:moe" else METHODS).items():
                samples, fewer = SLOW.get(row, (options.samples, {})) if large else (options.samples, {})
                if (options.rows and row not in options.rows) or (large and row in SLOW and share != 0.2):
                    continue
                if any((r["model"], r["row"], r["share"]) == (name, row, share) for r in known["methods"]):
                    continue
                sparsity = sparsity_for(subject, asked, share)
                if sparsity is None:
                    continue
                texts = texts or Texts(model, tokenizer, {"text": options.text}, options.windows)
                ids = draw_windows(documents, tokenizer, Windows(samples, options.length, documents="joined"))
                found = {"model": name, "row": row, "share": share, "sparsity": sparsity, "samples": samples}
                found |= {"backward": asked.backward}
                begun = time.process_time()
                try:
                    smaller = sparity.restructure(
                        model, ids, method=asked.method, sparsity=sparsity, **asked.given(model) | fewer
                    )
                    found["seconds"] = time.process_time() - begun
                    found |= sizes_of(smaller, model) | {"opens": opens_in(smaller)}
                    found["windows"] = [window for _, window in texts.measured(smaller)]
                except SparityError as error:
                    found["refused"] = str(error)
                known["methods"].append(found)
                keep()
                print(f"{name}, {row}, {share}: {found.get('refused') or cell(found)}", flush=True)


def run_healed(known, options, keep):
    """Measure what is missing of `healed`, by recipes."""
    for name in options.models:
        model, rows = load(name, dtype="float32"), {}
        for row in HEALED if name != "zoo:moe" else ():
            asked = METHODS[row]
            cut = {
                "method": {asked.method: asked.given(model)},
                "sparsity": sparsity_for(Subject(model, None), asked, 0.2),
            }
            rows |= {f"{row}, {heal}": [{"structure": cut}, {"heal": how}] for heal, how in HEAL.items()}
        two_of_four = {"prune": {"score": "wanda", "pattern": "2:4"}}
        rows["2:4"] = [two_of_four]
        rows["2:4, eora, rank 32"] = [two_of_four, {"heal": {"method": {"eora": {"rank": 32}}}}]
        wanted = options.rows or (HEALED_LARGE if model.num_parameters() > LARGE else rows)
        chosen = {row: stages for row, stages in rows.items() if row in wanted}
        asked = argparse.Namespace(**{**vars(options), "models": [name], "window": 512})
        recipe_rows.run(chosen, {"rows": known["healed"]}, asked, keep)


def cell(row):
    """What is removed, perplexity over dense, KL."""
    over = numbers.ratio(1 + change(row["windows"]))
    return f"{numbers.percent(row['removed'])}, {over}, {mean(row['windows'], 'kl'):.3f}, {row['opens']}"


def tables(known):
    """The rows as Markdown: a table for each model and share, best first; what was refused; healing."""
    lines = []
    done = [row for row in known["methods"] if "windows" in row]
    for name in dict.fromkeys(row["model"] for row in done):
        of_model = [row for row in done if row["model"] == name]
        dense = exp(mean(of_model[0]["windows"], "dense_loss"))
        lines += [f"**`{name}`**, dense {dense:.2f}", ""]
        lines += ["| asked | method | removed | perplexity | of dense | KL | same top-1 | opens in | CPU seconds |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for row in sorted(of_model, key=lambda row: (row["share"], change(row["windows"]))):
            silent = f", {numbers.percent(row['silent'])} silent" if row["silent"] else ""
            over = 1 + change(row["windows"])
            lines.append(
                f"| {row['share']:.0%} | {row['row']}{', gradients' if row['backward'] else ''} | "
                f"{numbers.percent(row['removed'])}{silent} | {exp(mean(row['windows'], 'loss')):.2f} | "
                f"{numbers.ratio(over)} | {mean(row['windows'], 'kl'):.3f} | "
                f"{numbers.percent(mean(row['windows'], 'top1'))} | {row['opens']} | {row['seconds']:.0f} |"
            )
        lines.append("")
    refused = [row for row in known["methods"] if "refused" in row]
    lines += [f"- {row['model']}, {row['row']}, {row['share']:.0%}: {row['refused']}" for row in refused]
    for name in dict.fromkeys(row["model"] for row in known["healed"]):
        lines += ["", f"**`{name}`**, healed", "", "| row | perplexity | of dense | KL | CPU seconds |"]
        lines += ["|---|---|---|---|---|"]
        for row in (row for row in known["healed"] if row["model"] == name):
            lines.append(
                f"| {row['row']} | {row['perplexity']:.2f} | {numbers.ratio(row['perplexity'] / row['dense'])} | "
                f"{row['kl']:.3f} | {row['seconds']:.0f} |"
            )
    return "\n".join(lines)


def draw(known, folder):
    """A plot for each model: perplexity over dense against the share of the blocks' weights that is gone or silent."""
    for name in dict.fromkeys(row["model"] for row in known["methods"]):
        lines = {}
        for row in known["methods"]:
            if row["model"] == name and "windows" in row:
                gone = 100 * (row["removed"] + row["silent"])
                lines.setdefault(row["row"], {})[round(gone, 1)] = 1 + change(row["windows"])
        if lines:
            title = f"{name}: perplexity over the dense model's"
            order = [Line(row, lines[row]) for row in sorted(lines, key=lambda row: -max(lines[row].values()))]
            across = "% of the blocks' weights that are gone or silent"
            chart = line_plot(title, order, across, "times dense", "{:.3g}".format, ("target", TARGET))
            (folder / f"structure-{name.removeprefix('zoo:')}.svg").write_text(picture([(title, chart)]))


def main():
    """Run what is missing, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--parts", nargs="+", choices=("methods", "healed"), default=("methods", "healed"))
    parser.add_argument("--rows", nargs="+", help="these only")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="these only")
    parser.add_argument("--calibration", default="python-docs:calibration")
    parser.add_argument("--text", default="python-docs:held-out", help="what is measured on")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--draw", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    known = (
        read_json_object(options.out) if options.out.exists() else {"machine": describe(), "methods": [], "healed": []}
    )
    if options.table:
        print(tables(known))
    elif options.draw:
        draw(known, options.draw)
    else:
        runs = {"methods": run_methods, "healed": run_healed}
        for part in options.parts:
            runs[part](known, options, lambda: write_json(options.out, plain(known)))


if __name__ == "__main__":
    main()
