"""The findings of a report as sentences, the same on the page, in the table and in the model card."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from sparity.measure.data.report import Baseline, Candidate, Quality, Report, Speed
from sparity.measure.show import numbers

Quantity = Literal["zeros", "skipped", "left", "loss"]  # of a projection
SHARE = "The ratio to dense on our kernels is what sparsity gives; the one to transformers also holds faster kernels."


def describe_model(report: Report) -> str:
    """The dense model in a few words."""
    parameters = f"{numbers.amount(report.parameters)} parameters"
    return f"{report.architecture}, {parameters}, {count(report.blocks, 'block')}, {report.dtype}"


def summarise(candidate: Candidate) -> str:
    """What was done, what it cost in quality, whether it got faster, and the size of the files."""
    parts = (describe_changes, describe_quality, describe_speed, describe_size)
    return " ".join(describe(candidate) for describe in parts)


def summarise_briefly(candidate: Candidate) -> str:
    """The same for one of several: what changed, quality and speed."""
    speed = describe_decoding(candidate.speed) if candidate.speed else describe_speed(candidate)
    return f"{describe_changes(candidate)} {describe_quality(candidate)} {speed}"


def describe_changes(candidate: Candidate) -> str:
    """What happened to the weights: zeros, shapes, bits, what is skipped at run time; and the stages in order."""
    parts = (_zeros(candidate), _shapes(candidate), _bits(candidate), _skipping(candidate))
    said = [part for part in parts if part] or ["No weight was changed."]
    if len(candidate.stages) > 1:
        said.append(f"Stages, in this order: {'; '.join(candidate.stages)}.")
    return " ".join(said)


def _zeros(candidate: Candidate) -> str:
    found = [item for item in candidate.projections if item.zeros > 0 or item.target is not None]
    if not found:
        return ""
    stages = f", {candidate.stages[0]}" if len(candidate.stages) == 1 else ""
    target = "" if candidate.target is None else f" (target {numbers.percent(candidate.target)}{stages})"
    return (
        f"{numbers.percent(candidate.sparsity)} of the weights in {count(len(found), 'projection')} are zero{target}, "
        f"{numbers.percent(candidate.model_sparsity)} of all parameters."
    )


def _shapes(candidate: Candidate) -> str:
    smaller = [item for item in candidate.projections if item.shape_before != item.shape_after]
    if not smaller:
        return ""
    left = sum(item.size for item in smaller) / sum(item.size_before for item in smaller)
    return (
        f"{_are(len(smaller))} smaller: {numbers.percent(left)} of their weights are left; the model has "
        f"{numbers.amount(candidate.parameters)} parameters."
    )


def _bits(candidate: Candidate) -> str:
    found = [(item.bits, item.size) for item in candidate.projections if item.bits is not None]
    if not found:
        return ""
    mean = sum(bits * size for bits, size in found) / sum(size for _, size in found)
    return f"{_are(len(found))} stored in {mean:.3g} bits per weight."


def _skipping(candidate: Candidate) -> str:
    found = [item for item in candidate.projections if item.skipped is not None]
    if not found or candidate.skipped is None:
        return ""
    asked = [(item.skip_target, item.size) for item in found if item.skip_target is not None]
    total = sum(size for _, size in asked)
    target = f" (target {numbers.percent(sum(share * size for share, size in asked) / total)})" if total else ""
    return (
        f"{numbers.percent(candidate.skipped)} of the input channels of {count(len(found), 'projection')} are skipped "
        f"at run time{target}, measured on calibration text."
    )


def _are(number: int) -> str:
    return f"{count(number, 'projection')} {'is' if number == 1 else 'are'}"


def describe_quality(candidate: Candidate) -> str:
    """What it cost in perplexity, on each text."""
    if not candidate.quality:
        return "Quality was not measured."
    texts = [
        f"from {numbers.perplexity(item.dense_perplexity)} to {numbers.perplexity(item.perplexity)} on {item.text} "
        f"({numbers.change(item.change)}, {item.grade})"
        for item in candidate.quality
    ]
    return f"Perplexity went {join(texts)}."


def describe_speed(candidate: Candidate) -> str:
    """Whether it got faster."""
    if candidate.speed is None:
        return "Speed was not measured."
    share = f" {SHARE}" if candidate.speed.engine_dense else ""
    return f"{describe_decoding(candidate.speed)}{share}"


def describe_decoding(speed: Speed) -> str:
    """Decoding beside every dense model that it was timed beside."""
    compared = {"faster": "faster than", "slower": "slower than", "on par": "on par with"}
    said = [
        f"{compared[numbers.direction(item.decode_ratio)]} {name}: {numbers.spread(item.decode_ratio, numbers.ratio)}, "
        f"{numbers.rate(speed.sparse.decode.median)} against {numbers.rate(item.pace.decode.median)} tokens/s"
        for name, item in baselines(speed).items()
    ]
    return f"Decoding is {join(said)}."


def baselines(speed: Speed) -> dict[str, Baseline]:
    """The dense models that the sparse one was timed beside, by name."""
    dense = Baseline(speed.dense, speed.decode_ratio, speed.first_token_ratio)
    if speed.engine_dense is None:
        return {"dense": dense}
    return {"dense in transformers": dense, "dense on our kernels": speed.engine_dense}


def describe_larger(report: Report) -> list[str]:
    """What was measured on a random model beside a small one, and why; nothing where it was not tried."""
    larger = report.larger
    if larger is None:
        return []
    size = max(candidate.bytes_dense for candidate in report.candidates)
    why = (
        f"{report.model} is too small to gain from zeros: its {numbers.size(size)} of weights fit into a processor's "
        "cache, where reading fewer of them saves hardly any time. What it gains beside transformers is the engine's "
        "shorter way to a token."
    )
    if larger.speed is None:
        return [why, f"No larger model was timed: {larger.skipped}."]
    return [
        why,
        f"A Llama of {numbers.amount(larger.parameters)} random weights, {numbers.percent(larger.sparsity)} of those "
        f"of its blocks zero, packed, shows speed only: {numbers.size(larger.bytes_sparse)} instead of "
        f"{numbers.size(larger.bytes_dense)} in memory, both bfloat16. {describe_decoding(larger.speed)}",
        describe_protocol(larger.speed),
    ]


def describe_protocol(speed: Speed) -> str:
    """How the speed was measured."""
    return (
        f"Prompt of {count(speed.prompt, 'token')}, then {count(speed.tokens, 'token')} one by one, batch "
        f"{speed.batch}; median of {count(speed.rounds, 'round')} [lowest-highest], dense and sparse in turns. "
        f"A ratio above 1x is faster than dense.{f' {SHARE}' if speed.engine_dense else ''}"
    )


def describe_size(candidate: Candidate) -> str:
    """What happened to the weight files."""
    sparse, dense = numbers.size(candidate.bytes_sparse), numbers.size(candidate.bytes_dense)
    before = "as before" if candidate.bytes_sparse == candidate.bytes_dense else f"{dense} before"
    return f"The weight files take {sparse} ({before})."


def describe_effort(candidate: Candidate) -> str:
    """What the stages themselves took."""
    effort = candidate.effort
    return (
        f"It took {numbers.seconds(effort.seconds)} on {count(effort.threads, 'thread')}, with "
        f"{numbers.amount(effort.calibration_tokens)} tokens of calibration text and a peak of "
        f"{numbers.size(effort.peak_memory)} of memory."
    )


def gather_notes(report: Report) -> list[tuple[str, str]]:
    """Every note once, as (whom it concerns, note); the first is empty where a note concerns all candidates."""
    names: dict[str, list[str]] = {}
    for candidate in report.candidates:
        for note in dict.fromkeys(candidate.notes):
            names.setdefault(note, []).append(candidate.name)
    everyone = len(report.candidates)
    return [("" if len(concerned) == everyone else join(concerned), note) for note, concerned in names.items()]


def gather_quality(report: Report) -> dict[tuple[str, int], list[tuple[Candidate, Quality]]]:
    """The measurements of every text and window, in the order of the candidates."""
    texts: dict[tuple[str, int], list[tuple[Candidate, Quality]]] = {}
    for candidate in report.candidates:
        for item in candidate.quality:
            texts.setdefault((item.text, item.window), []).append((candidate, item))
    return texts


def count(number: int, thing: str) -> str:
    """A number with its noun, such as "1 block", "24 blocks" or "168 projections"."""
    return f"{number:,} {thing if number == 1 else thing + 's'}"


def join(items: list[str]) -> str:
    """Items as "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def average_cells(candidate: Candidate, quantity: Quantity) -> dict[tuple[int, str], float]:
    """Mean by block and role, weighted by size, of the projections that have the quantity.

    `left` is the share of the dense model's weights that are still there, zeros among them.
    """
    sums: dict[tuple[int, str], tuple[float, int]] = {}
    for item in candidate.projections:
        value: float | None = item.size / item.size_before if quantity == "left" else getattr(item, quantity)
        if value is not None and math.isfinite(value):
            total, weight = sums.get((item.block, item.role), (0.0, 0))
            elements = item.size_before if quantity == "left" else item.size
            sums[item.block, item.role] = (total + value * elements, weight + elements)
    return {cell: total / weight for cell, (total, weight) in sums.items() if weight}


def describe_machine(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The machine's facts as (name, value) in words."""
    facts = []
    for name, value in machine.items():
        if name.endswith("_bytes") and isinstance(value, int | float):
            facts.append((name.removesuffix("_bytes").replace("_", " "), numbers.size(value)))
        else:
            facts.append((name.replace("_", " "), "none" if value is None else str(value)))
    return facts
