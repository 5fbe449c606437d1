"""Example reports with round numbers; `make_report` builds any number of candidates."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from sparity.measure.data.report import (
    Baseline,
    Candidate,
    Effort,
    Pace,
    Quality,
    Report,
    Speed,
    Spread,
    Verdict,
)
from sparity.stages import Change

ROLES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
ROLES |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
PLAIN = "Zeros are stored like other numbers in a plain export, so it is neither smaller nor faster than dense."
NAMES = ("wanda", "magnitude", "sparsegpt", "wanda-owl", "ria", "random", "two-of-four")
CHANGES = (0.162, 2.4, 0.071, 0.112, 0.148, 123_000.0, 0.55)
FACTORS = (0.87, 0.9, 1.0, 1.02, 0.95, 0.99, 1.31)


@pytest.fixture
def make_candidate() -> Callable[..., Candidate]:
    return build_candidate


@pytest.fixture
def make_report() -> Callable[..., Report]:
    return build_report


@pytest.fixture
def report() -> Report:
    """One candidate, 50.17 % sparse, 0.87 times as fast as dense, with a kept and a missed limit."""
    return build_report(1)


@pytest.fixture
def on_engine(report) -> Report:
    """One candidate, 2.6 times as fast as dense in transformers and 1.5 times as dense on our kernels."""
    speed = report.candidates[0].speed
    gained = replace(
        speed,
        sparse=Pace(Spread(0.8, 0.79, 0.83), Spread(23.7, 23.0, 24.1)),
        decode_ratio=Spread(2.6, 2.5, 2.7),
        engine_dense=Baseline(
            Pace(Spread(0.75, 0.74, 0.76), Spread(15.8, 15.5, 16.0)), Spread(1.5, 1.4, 1.6), Spread(0.94, 0.93, 0.97)
        ),
    )
    return replace(report, candidates=(replace(report.candidates[0], speed=gained),))


@pytest.fixture
def seven() -> Report:
    """Seven candidates: one with a perplexity of 1.6 million, one faster than dense, two on par with it."""
    return build_report(7)


@pytest.fixture
def hostile() -> Report:
    """Names that would break a page or a table if they were not escaped."""
    name = '<script>alert("x")</script>'
    plain = build_report(1, blocks=2)
    candidate = replace(
        plain.candidates[0],
        name="[red]<script>",
        stages=(f"{name} | `x`",),
        notes=(f"{name}\n# not a heading",),
        recipe={"model": name, "fence": "```\n```", name: [1, 2]},
        changes=tuple(
            replace(change, name=f"{name}{place}", role="<q&>")
            for place, change in enumerate(plain.candidates[0].changes)
        ),
        quality=(replace(plain.candidates[0].quality[0], text="a|b [x](http://e.com)", grade="<b>"),),
        verdicts=(Verdict(name, "[bold]1[/bold]", passed=False),),
    )
    return replace(plain, model=name, architecture=name, machine={name: name}, candidates=(candidate,))


def build_report(candidates: int = 1, blocks: int = 24, texts: tuple[str, ...] = ("wikitext-2",)) -> Report:
    machine = {
        "processor": "Example 9000",
        "cores": 8,
        "memory_bytes": 16_000_000_000,
        "gpu": None,
        "python": "3.11.7",
        "sparity": "0.1.0",
    }
    built = tuple(build_candidate(number, blocks, texts) for number in range(candidates))
    return Report("Qwen/Qwen2.5-0.5B", "Qwen2ForCausalLM", 494_032_768, blocks, "bfloat16", machine, built)


def build_candidate(number: int = 0, blocks: int = 24, texts: tuple[str, ...] = ("wikitext-2",)) -> Candidate:
    change, factor = CHANGES[number], FACTORS[number]
    changes = tuple(
        Change(
            "prune",
            f"model.layers.{block}.{path}",
            role,
            block,
            (896, 4864 if role == "down" else 896),
            (896, 4864 if role == "down" else 896),
            target=0.5,
            zeros=0.5 + 0.002 * (block - blocks / 2) * (number == 3),
            loss=0.01 + 0.001 * block + 0.01 * place,
        )
        for block in range(blocks)
        for place, (role, path) in enumerate(ROLES.items())
    )
    dense = Pace(Spread(0.850, 0.840, 0.910), Spread(9.12, 8.8, 9.4))
    sparse = Pace(Spread(0.880, 0.860, 0.930), Spread(9.12 * factor, 8.8 * factor, 9.4 * factor))
    grade = "acceptable" if change < 0.1 else "poor"
    return Candidate(
        name=f"{NAMES[number]}-50",
        recipe={
            "model": "Qwen/Qwen2.5-0.5B",
            "stages": [{"prune": {"score": NAMES[number], "pattern": "unstructured", "sparsity": 0.5}}],
            "accept": {"perplexity": "+5%", "decode": "1.3x"},
        },
        stages=(f"{NAMES[number]}, unstructured",),
        target=0.5,
        sparsity=0.5017,
        model_sparsity=0.3621,
        parameters=494_032_768,
        bytes_dense=988_097_824,
        bytes_sparse=988_097_824,
        changes=changes,
        effort=Effort(725.0, 3_200_000_000, 262_144, 8),
        quality=tuple(
            Quality(text, 2048, 10_235, 13.07, 13.07 * (1 + change), change, grade, 0.1523, 0.8014) for text in texts
        ),
        speed=Speed(
            512,
            128,
            5,
            dense,
            sparse,
            decode_ratio=Spread(factor, factor - 0.02, factor + 0.03),
            first_token_ratio=Spread(0.97, 0.91, 1.06),
        ),
        verdicts=(
            Verdict("decode 1.3x", f"{factor:.2f}x", passed=factor >= 1.3),
            Verdict("perplexity +20%", f"{change:+.1%}", passed=change < 0.2),
        ),
        notes=(PLAIN,),
    )
