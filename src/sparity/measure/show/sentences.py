"""The findings of a report as sentences, the same on the page, in the table and in the model card."""

from collections.abc import Mapping
from typing import Any

import torch

from sparity.checkpoints.coded_matrix import GAPS
from sparity.checkpoints.coded_sizes import CodedSizes
from sparity.measure.data.report import Baseline, Candidate, Quality, Report, Speed
from sparity.measure.show import numbers
from sparity.products import choice

SHARE = "The ratio to dense on our kernels is what sparsity gives; the one to transformers also holds faster kernels."

SPARED = (
    "Weights spared per token, of all parameters of the dense model: those that are cut away, those that are zero, and "
    "those in input channels that are skipped at run time, zeros and skipped channels taken as independent. A plain "
    "export stores its zeros and still reads them."
)


def describe_model(report: Report) -> str:
    """The dense model in a few words."""
    parameters = f"{numbers.amount(report.parameters)} parameters"
    return f"{report.architecture}, {parameters}, {count(report.blocks, 'block')}, {report.dtype}"


def summarise(report: Report, candidate: Candidate) -> str:
    """What was done, what it cost in quality, whether it got faster, and the size of the files."""
    speed = _speed_in_turns(report, candidate) or describe_speed(candidate)
    return " ".join([describe_changes(report, candidate), describe_quality(candidate), speed, describe_size(candidate)])


def summarise_briefly(report: Report, candidate: Candidate) -> str:
    """The same for one of several: changes, quality and speed."""
    changes = shorten_changes(report, candidate)
    if candidate.speed:
        speed = describe_decoding(candidate.speed)
    else:
        speed = _speed_in_turns(report, candidate) or describe_speed(candidate)
    return f"{changes[0].upper()}{changes[1:]}. {describe_quality(candidate)} {speed}"


def describe_changes(report: Report, candidate: Candidate) -> str:
    """What became of the weights: zeros, shapes, bits, and what is skipped at run time."""
    said = (_zeros(candidate), _shapes(report, candidate), _bits(candidate), _skipping(candidate))
    return " ".join(filter(None, said)) or _nothing(candidate)


def shorten_changes(report: Report, candidate: Candidate) -> str:
    """The same in a few words, without targets and counts."""
    totals, left = candidate.totals, report.left(candidate)
    said = [
        f"{numbers.percent(candidate.sparsity)} sparse" if totals.has_zeros else "",
        f"{numbers.percent(left)} of the parameters left" if left is not None else "",
        f"{numbers.bits(totals.bits)} per weight" if totals.bits is not None else "",
        f"{numbers.percent(totals.skipped)} skipped at run time" if totals.skipped is not None else "",
    ]
    return ", ".join(filter(None, said)) or "no weight removed or skipped"


def describe_stages(candidate: Candidate) -> str:
    """What each stage was, in their order."""
    if len(candidate.stages) == 1:
        return f"One stage: {candidate.stages[0]}."
    return f"{count(len(candidate.stages), 'stage')}, one after the other: {'; '.join(candidate.stages)}."


def _zeros(candidate: Candidate) -> str:
    totals = candidate.totals
    if not totals.has_zeros:
        return ""
    return (
        f"{numbers.percent(candidate.sparsity)} of the weights in {count(len(totals.zeroed), 'projection')} are zero"
        f"{_target(candidate.target)}, {numbers.percent(candidate.model_sparsity)} of all parameters"
        f"{' that are left' if totals.reshaped else ''}."
    )


def _shapes(report: Report, candidate: Candidate) -> str:
    reshaped = candidate.totals.reshaped
    gone, smaller = sum(each.size == 0 for each in reshaped), sum(0 < each.left < 1 for each in reshaped)
    kinds = {"smaller": smaller, "gone": gone, "of another shape": len(reshaped) - smaller - gone}
    said = [f"{_projections_are(number)} {kind}" for kind, number in kinds.items() if number]
    left, dense = numbers.amount(candidate.parameters), numbers.amount(report.parameters)
    return f"{join(said)}: {left} of {dense} parameters are left." if said else ""


def _bits(candidate: Candidate) -> str:
    totals = candidate.totals
    if totals.bits is None:
        return ""
    kinds = sorted({each.bits for each in totals.requantised if each.bits is not None})
    average = f" on average, from {kinds[0]:g} to {kinds[-1]:g}" if len(kinds) > 1 else ""
    return f"{_projections_are(len(totals.requantised))} rounded to {numbers.bits(totals.bits)} per weight{average}."


def _skipping(candidate: Candidate) -> str:
    totals = candidate.totals
    if totals.skipped is None:
        return ""
    return (
        f"{numbers.percent(totals.skipped)} of the input channels of {count(len(totals.skipping), 'projection')} are "
        f"skipped at run time{_target(totals.skip_target)}."
    )


def _nothing(candidate: Candidate) -> str:
    """Of a run that made nothing zero, smaller, shorter or skipped."""
    if not candidate.changes:
        return "No projection was changed."
    where = count(len(candidate.totals.outcomes), "projection")
    return f"No weight of {where} was removed, made zero or skipped."


def _projections_are(number: int) -> str:
    return f"{count(number, 'projection')} {'is' if number == 1 else 'are'}"


def _target(share: float | None) -> str:
    return "" if share is None else f" (target {numbers.percent(share)})"


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


def _speed_in_turns(report: Report, candidate: Candidate) -> str:
    """Of a candidate that was timed together with all others and not beside dense alone; nothing of any other."""
    rates = {one.name: numbers.rate(one.rate.median) for one in report.contestants}
    if candidate.speed or candidate.name not in rates:
        return ""
    dense = [f"{rates[one.name]} ({one.name})" for one in report.contestants if one.kind == "dense"]
    return f"In turns with all others it decodes {rates[candidate.name]} tokens/s, against {join(dense)}."


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


def describe_coding(coded: CodedSizes) -> str:
    """What a Huffman code saves in the files, tables included; nothing where there is none."""
    matrices = sum(coded.layouts.values())
    if not matrices:
        return ""
    by_gaps = f", {coded.layouts[GAPS]} of them as gaps and values" if GAPS in coded.layouts else ""
    stored, dense = numbers.size(coded.stored), numbers.size(coded.dense)
    return (
        f"{matrices} {'matrix' if matrices == 1 else 'matrices'} Huffman-coded{by_gaps}, in {stored} with tables "
        f"(dense {dense}), decoded when loaded"
    )


def describe_products(dtype: torch.dtype) -> str | None:
    """What calibration and quality were computed with where products of the model's type are emulated, else None."""
    if not choice.emulated(dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"Products of {name} are computed in {choice.words(dtype)} here: calibration and quality were measured so, "
        f"each product rounded to {name}, for the dense and the sparse model alike. transformers was timed with "
        "its own."
    )


def describe_size(candidate: Candidate) -> str:
    """What happened to the weight files."""
    sparse, dense = numbers.size(candidate.bytes_sparse), numbers.size(candidate.bytes_dense)
    before = "as before" if candidate.bytes_sparse == candidate.bytes_dense else f"{dense} before"
    return f"The weight files take {sparse} ({before})."


def describe_effort(candidate: Candidate) -> str:
    """What the run itself took."""
    effort = candidate.effort
    return (
        f"The run took {numbers.seconds(effort.seconds)} on {count(effort.threads, 'thread')}, with "
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
    """A number with its noun, such as "1 block" or "24 blocks"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def join(items: list[str]) -> str:
    """Items as "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def describe_machine(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The machine's facts as (name, value) in words."""
    facts = []
    for name, value in machine.items():
        if name.endswith("_bytes") and isinstance(value, int | float):
            facts.append((name.removesuffix("_bytes").replace("_", " "), numbers.size(value)))
        else:
            facts.append((name.replace("_", " "), "none" if value is None else str(value)))
    return facts


def describe_answer(answer: str) -> str:
    """What a model said, or that it said nothing."""
    return answer or "(nothing: the likeliest first token ends the answer)"
