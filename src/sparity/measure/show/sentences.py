"""The findings of a report as sentences, the same on the page, in the table and in the model card."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from sparity.measure.data.report import Baseline, Candidate, Quality, Report, Speed
from sparity.measure.show import numbers

SHARE = "The ratio to dense on our kernels is what sparsity gives; the one to transformers also holds faster kernels."


def describe_model(report: Report) -> str:
    """The dense model in a few words."""
    parameters = f"{numbers.amount(report.parameters)} parameters"
    return f"{report.architecture}, {parameters}, {count(report.blocks, 'block')}, {report.dtype}"


def summarise(candidate: Candidate) -> str:
    """What was done, what it cost in quality, whether it got faster, and the size of the files."""
    parts = (describe_pruning, describe_quality, describe_speed, describe_size)
    return " ".join(describe(candidate) for describe in parts)


def summarise_briefly(candidate: Candidate) -> str:
    """The same for one of several: sparsity, quality and speed."""
    sparse = f"{numbers.percent(candidate.sparsity)} of the pruned matrices is zero."
    speed = describe_decoding(candidate.speed) if candidate.speed else describe_speed(candidate)
    return f"{sparse} {describe_quality(candidate)} {speed}"


def describe_pruning(candidate: Candidate) -> str:
    """What was removed: realised sparsity, where, and the target."""
    return (
        f"{numbers.percent(candidate.sparsity)} of the weights in {count(len(candidate.projections), 'pruned matrix')} are "
        f"zero (target {numbers.percent(candidate.target or 0.0)}, {'; '.join(candidate.stages)}), "
        f"{numbers.percent(candidate.model_sparsity)} of all parameters."
    )


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
    """What the pruning itself took."""
    effort = candidate.effort
    return (
        f"Pruning took {numbers.seconds(effort.seconds)} on {count(effort.threads, 'thread')}, with "
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
    """A number with its noun, such as "1 block", "24 blocks" or "168 pruned matrices"."""
    plural = f"{thing[:-1]}ces" if thing.endswith("ix") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"


def join(items: list[str]) -> str:
    """Items as "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def average_cells(candidate: Candidate, quantity: Literal["zeros", "loss"]) -> dict[tuple[int, str], float]:
    """Mean by block and role, weighted by matrix size, of the layers that have the quantity."""
    sums: dict[tuple[int, str], tuple[float, int]] = {}
    for layer in candidate.projections:
        value: float | None = getattr(layer, quantity)
        if value is not None and math.isfinite(value):
            total, weight = sums.get((layer.block, layer.role), (0.0, 0))
            elements = layer.size
            sums[layer.block, layer.role] = (total + value * elements, weight + elements)
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
