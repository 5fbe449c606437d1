"""The README of a sparse model: what was done, what it cost, what was measured, how to load it."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from sparity.formats import build_encoding
from sparity.measure.data.report import Candidate, Report
from sparity.measure.show import numbers, sentences
from sparity.measure.show.sentences_tasks import PAIRED, change_words
from sparity.visible import escape

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
KEPT = "`kept_indices.json` says which of the dense model's channels, heads and blocks are left."
SPECIAL = re.compile(r"([\\`*\[\]|])")


def model_card(report: Report, candidate: Candidate, copied: Sequence[str] = ()) -> str:
    """A Hugging Face model card in Markdown with YAML front matter; `copied` names the files of the dense model."""
    sections = [
        f"# {_inline(report.model)}, {sentences.shorten_changes(report, candidate)}",
        _inline(f"Made with Sparity by the recipe below from {report.model} ({sentences.describe_model(report)})."),
        *(f"> {_inline(note)}" for note in candidate.notes),
        _done(report, candidate),
        _quality(candidate),
        _tasks(candidate),
        _speed(candidate),
        _acceptance(candidate),
        _loading(candidate),
        f"## Recipe\n\n{_fence(numbers.recipe_yaml(candidate.recipe), 'yaml')}",
        _copied(copied),
        _machine(report),
    ]
    return _front_matter(report, candidate) + "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(report: Report, candidate: Candidate) -> str:
    head: dict[str, Any] = {"base_model": report.model} if HUB_NAME.fullmatch(report.model) else {}
    head |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": _tags(candidate),
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n"


def _tags(candidate: Candidate) -> list[str]:
    """What kinds of change there are."""
    totals, output = candidate.totals, candidate.recipe.get("output", {})
    quantised = totals.bits is not None or not build_encoding(output.get("values", "same")).exact
    tags = {
        "sparity": True,
        "sparse": totals.has_zeros or totals.skipped is not None,
        "pruned": totals.has_zeros or bool(totals.reshaped),
        "activation-sparsity": totals.skipped is not None,
        "quantized": quantised,
    }
    return [tag for tag, fits in tags.items() if fits]


def _done(report: Report, candidate: Candidate) -> str:
    said = [
        sentences.describe_changes(report, candidate),
        sentences.describe_stages(candidate),
        sentences.describe_size(candidate),
        sentences.describe_effort(candidate),
    ]
    lines = [_inline(sentence) for sentence in said]
    if candidate.totals.reshaped:
        lines.insert(1, KEPT)
    return "## What was done\n\n" + "\n\n".join(lines)


def _quality(candidate: Candidate) -> str:
    if not candidate.quality:
        return f"## Quality\n\n{sentences.describe_quality(candidate)}"
    rows = [
        (
            item.text,
            f"{item.window:,}",
            numbers.perplexity(item.dense_perplexity),
            numbers.perplexity(item.perplexity),
            f"{numbers.change(item.change)} ({item.grade})",
            numbers.divergence(item.kl),
            numbers.percent(item.top1),
        )
        for item in candidate.quality
    ]
    heads = (
        "text",
        "window, tokens",
        "perplexity, dense",
        "perplexity, sparse",
        "change",
        "KL, nats per token",
        "same top-1",
    )
    return f"## Quality\n\n{_table(heads, rows)}"


def _tasks(candidate: Candidate) -> str:
    if not candidate.tasks:
        return ""
    rows = [
        (one.name, one.source, one.metric, f"{one.items:,}", f"{one.first:.3f}", f"{one.second:.3f}", change_words(one))
        for one in candidate.tasks
    ]
    heads = ("task", "items from", "metric", "items", "dense", "sparse", "change, 95 % interval")
    return f"## Tasks\n\n{_table(heads, rows)}\n\n{_inline(PAIRED)}"


def _speed(candidate: Candidate) -> str:
    parts = [f"## Speed\n\n{_inline(sentences.describe_speed(candidate))}"]
    speed = candidate.speed
    if speed:
        found = sentences.baselines(speed)
        rows = []
        for name, item in found.items():
            where = f", {name}" if len(found) > 1 else ""
            rows += [
                (
                    f"decode, tokens/s{where}",
                    numbers.spread(item.pace.decode, numbers.rate),
                    numbers.spread(speed.sparse.decode, numbers.rate),
                    numbers.speed_ratio(item.decode_ratio),
                ),
                (
                    f"time to first token{where}",
                    numbers.spread(item.pace.first_token, numbers.seconds),
                    numbers.spread(speed.sparse.first_token, numbers.seconds),
                    numbers.speed_ratio(item.first_token_ratio),
                ),
            ]
        parts += [_table(("", "dense", "sparse", "ratio"), rows), sentences.describe_protocol(speed)]
    return "\n\n".join(parts)


def _acceptance(candidate: Candidate) -> str:
    if not candidate.verdicts:
        return ""
    rows = [(item.limit, item.reached, "pass" if item.passed else "missed") for item in candidate.verdicts]
    return f"## Acceptance\n\n{_table(('limit', 'reached', 'verdict'), rows)}"


def _loading(candidate: Candidate) -> str:
    packed = candidate.recipe.get("output", {}).get("format") == "packed"
    reads = ["reads the packed weights"] * packed + ["attaches what is done at run time"] * bool(candidate.runtime)
    lines = (
        *((f"import sparity  # {sentences.join(reads)}",) if reads else ()),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'name = "path/to/this/folder"',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")',
    )
    parts = ["## How to load it", _fence("\n".join(lines), "python")]
    if candidate.runtime:
        parts.append(
            f"Done at run time: {_inline(sentences.join(list(candidate.runtime)))}. "
            "`sparity.load(name, runtime=False)` gives the model without it."
        )
    return "\n\n".join(parts)


def _copied(names: Sequence[str]) -> str:
    if not names:
        return ""
    listed = "\n".join(f"- {_inline(name)}" for name in names)
    return f"## From the dense model\n\nThese files are copies of its own, and its licence holds here too:\n\n{listed}"


def _machine(report: Report) -> str:
    facts = "\n".join(
        f"- {_inline(name)}: {_inline(value)}" for name, value in sentences.describe_machine(report.machine)
    )
    return f"## Machine and versions\n\n{facts}" if facts else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_inline(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _inline(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return SPECIAL.sub(r"\\\1", escape(" ".join(text.split()), quote=False))


def _fence(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
