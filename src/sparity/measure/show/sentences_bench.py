"""What a benchmark found, as sentences: the same in the terminal and on the page."""

import torch

from sparity.measure.data.bench_report import BenchReport, Ratio
from sparity.measure.show import numbers, sentences
from sparity.products import choice

MEMORY = (
    "Weights are what a contender holds while it runs; peak memory is the whole resident memory of a process of its "
    "own, Python and PyTorch among it, while it generates."
)


def describe_protocol(report: BenchReport, faster: str | None = None) -> str:
    """How it was measured; a ratio above 1x says that `faster`, by default the model of the benchmark, is faster."""
    prompt, tokens = sentences.count(report.prompt, "token"), sentences.count(report.tokens, "token")
    turns = "all contenders in turns within each round" if report.interleaved else "each contender by itself"
    return (
        f"Greedy generate of transformers in bfloat16 on {sentences.count(report.threads, 'thread')}: prompts of "
        f"{prompt}, one token, then {tokens} that are timed one by one; median of "
        f"{sentences.count(report.rounds, 'round')} [lowest-highest], {turns}. A ratio above 1x means that "
        f"{report.model if faster is None else faster} is faster."
    )


def describe_products() -> str | None:
    """What prompts were read with where bfloat16 products are emulated, else None."""
    if not choice.emulated(torch.bfloat16):
        return None
    return (
        f"Products of bfloat16 are computed in {choice.words(torch.bfloat16)} here where the engine reads prompts; "
        "transformers was timed with its own. Part of the engine's lead to the first token is what transformers would "
        "gain in float32."
    )


def describe_results(report: BenchReport) -> list[str]:
    """A sentence for each batch size and opponent; "faster" only where every round says so."""
    return [_describe(report.model, ratio) for ratio in report.ratios]


def _describe(model: str, ratio: Ratio) -> str:
    comparison = {"faster": "faster than", "slower": "slower than", "on par": "on par with"}
    return (
        f"At batch {ratio.batch} {model} decodes {comparison[numbers.direction(ratio.decode)]} {ratio.against}: "
        f"{numbers.spread(ratio.decode, numbers.ratio)}; to the first token "
        f"{numbers.spread(ratio.first_token, numbers.ratio)}."
    )
