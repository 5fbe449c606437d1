"""What a benchmark found, as sentences: the same in the terminal and on the page."""

from sparity.measure import format, words
from sparity.measure.bench_report import BenchReport, Ratio

MEMORY = (
    "Weights are what a contender holds while it runs; peak memory is the whole resident memory of a process of its "
    "own, Python and PyTorch among it, while it generates."
)


def describe_protocol(report: BenchReport) -> str:
    """How it was measured."""
    prompt, tokens = words.count(report.prompt, "token"), words.count(report.tokens, "token")
    turns = "all contenders in turns within each round" if report.interleaved else "each contender by itself"
    return (
        f"Greedy generate of transformers in bfloat16 on {words.count(report.threads, 'thread')}: prompts of "
        f"{prompt}, one token, then {tokens} that are timed one by one; median of "
        f"{words.count(report.rounds, 'round')} [lowest-highest], {turns}. A ratio above 1x means that {report.model} "
        "is faster."
    )


def describe_results(report: BenchReport) -> list[str]:
    """A sentence for each batch size and opponent; "faster" only where every round says so."""
    return [_describe(report.model, ratio) for ratio in report.ratios]


def _describe(model: str, ratio: Ratio) -> str:
    comparison = {"faster": "faster than", "slower": "slower than", "on par": "on par with"}
    return (
        f"At batch {ratio.batch} {model} decodes {comparison[format.direction(ratio.decode)]} {ratio.against}: "
        f"{format.spread(ratio.decode, format.ratio)}; to the first token "
        f"{format.spread(ratio.first_token, format.ratio)}."
    )
