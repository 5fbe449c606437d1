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
from sparity.stages.change import Change

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
        runtime=(f"{name} | `y`",),
        notes=(f"{name}\n# not a heading",),
        recipe={"model": name, "fence": "```\n```", name: [1, 2]},
        changes=tuple(replace(change, stage=name, name=name, role="<q&>") for change in plain.candidates[0].changes),
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


# A model of 2 blocks and 400 parameters, 224 of them in projections; what each kind of change makes of it.
SHAPES = {"q": (4, 4), "gate": (8, 4), "up": (8, 4), "down": (4, 8)}
SMALLER = {"gate": (6, 4), "up": (6, 4), "down": (4, 6)}
SKIPPED = {"q": 0.35, "gate": 0.4, "up": 0.4, "down": 0.45}


def build_changes(stage: str, before: dict = SHAPES, after: dict = SHAPES, **more: object) -> tuple[Change, ...]:
    """A change of every projection in `after`; a value of `more` may be given by role."""
    return tuple(
        Change(
            stage,
            f"model.layers.{block}.{ROLES[role]}",
            role,
            block,
            before[role],
            after[role],
            **{key: value[role] if isinstance(value, dict) else value for key, value in more.items()},
        )
        for block in range(2)
        for role in after
    )


def build_kinds() -> dict[str, Candidate]:
    """Candidates by kind of change: of one kind, of all kinds, and of none."""
    plain = replace(build_candidate(), name="", stages=(), target=None, sparsity=0.0, model_sparsity=0.0, notes=())
    pruned = build_changes("prune", zeros=0.5, target=0.5)
    smaller = {"after": SMALLER, "target": 0.25, "loss": 0.125}
    skipping = {"target": 0.4, "skipped": SKIPPED}
    all_three = (
        *pruned,
        *build_changes("structure", zeros=0.5, **smaller),
        *build_changes("activations", SHAPES | SMALLER, SHAPES | SMALLER, zeros=0.5, **skipping),
    )
    kinds = {
        "pruned": replace(plain, changes=pruned, target=0.5, sparsity=0.5, model_sparsity=0.28, parameters=400),
        "cut": replace(plain, changes=build_changes("structure", zeros=0.0, **smaller), parameters=352),
        "skipping": replace(
            plain, changes=build_changes("activations", zeros=0.0, **skipping), runtime=("activations",)
        ),
        "quantised": replace(
            plain, changes=build_changes("quantise", zeros=0.0, bits=dict.fromkeys(SHAPES, 4.0) | {"q": 8.0})
        ),
        "healed": replace(plain, changes=build_changes("heal", zeros=0.0, loss=0.25)),
        "nothing": replace(plain, changes=()),
        "all": replace(
            plain,
            changes=all_three,
            target=0.5,
            sparsity=0.5,
            model_sparsity=0.25,
            parameters=352,
            runtime=("activations",),
        ),
    }
    words = {"all": ("wanda, 50%", "25 % of the channels", "thresholds, 40 %"), "nothing": ("sinks, 4 tokens",)}
    return {
        kind: replace(
            candidate,
            name=kind,
            stages=words.get(kind, (f"{kind} somehow",)),
            parameters=candidate.parameters if candidate.parameters < 1000 else 400,
        )
        for kind, candidate in kinds.items()
    }


@pytest.fixture
def kinds() -> dict[str, Report]:
    """A report of one candidate for every kind of change."""
    return {kind: small_report(candidate) for kind, candidate in build_kinds().items()}


@pytest.fixture
def every_kind() -> Report:
    """One report of all of them."""
    return small_report(*build_kinds().values())


def small_report(*candidates: Candidate) -> Report:
    return replace(build_report(0), parameters=400, blocks=2, candidates=candidates)
