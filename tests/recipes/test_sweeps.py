"""The ready sweeps: each is valid with all its combinations, and they run."""

from pathlib import Path

import pytest

import sparity
from sparity import zoo
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.tokens import tokenised_once
from sparity.sweep_file import Sweep

SWEEPS = sorted((Path(__file__).parents[2] / "recipes" / "sweeps").glob("*.yaml"))
SIZES = {
    "attention_or_mlp": 12,
    "calibration_sets": 4,
    "models": 9,
    "patterns": 10,
    "ria_exponent": 10,
    "rounds": 7,
    "scores_and_sparsities": 16,
    "smollm2": 16,
    "solvers": 26,
    "trained_activations": 12,
}
MODELS = {"smollm2": "zoo:smollm2"}
STAND_INS = {  # for a model that is fetched and texts that are the user's
    "smollm2": ["model=zoo:llama", "calibration.text=python-docs", "measure.perplexity=[python-docs:held-out]"],
    "solvers": ["calibration.text=python-docs", "measure.perplexity=[python-docs:held-out]"],
    "rounds": ["calibration.text=python-docs", "measure.perplexity=[python-docs:held-out]"],
}
SMALL = ["calibration.samples=2", "calibration.length=32", "measure.window=32", "measure.windows=1"]


def test_there_is_one_for_each_study():
    assert [path.stem for path in SWEEPS] == sorted(SIZES)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_is_valid_and_its_comment_says_what_it_is(path):
    assert Sweep.read(path).base.model == MODELS.get(path.stem, "zoo:llama")
    sweep = Sweep.read(path, [*SMALL, *STAND_INS.get(path.stem, ())])
    assert len(sweep.combinations) == SIZES[path.stem]
    used = {combination.recipe.model for combination in sweep.combinations}
    assert used == ({f"zoo:{name}" for name in zoo.MODELS} if path.stem == "models" else {"zoo:llama"})
    with tokenised_once():
        for combination in sweep.combinations:
            prepare(combination.recipe, device="cpu")
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20
    assert f"sparity sweep {path.relative_to(path.parents[2])} -o OUT" in path.read_text()


def test_the_calibration_study_runs(tmp_path):
    (path,) = (path for path in SWEEPS if path.stem == "calibration_sets")
    sweep = Sweep.read(path, SMALL)
    assert [axis.numbers for axis in sweep.axes] == [None, None]
    rows = sparity.sweep({"base": sweep.base, "vary": sweep.settings}, output=tmp_path / "out").report.rows
    assert [row.labels for row in rows] == [
        (text, method) for text in ("documentation", "code") for method in ("wanda", "sparsegpt")
    ]
    for row in rows:
        assert row.sparsity == pytest.approx(0.5, abs=0.01)
        assert [quality.text for quality in row.quality] == ["python-docs:held-out", "python-code:held-out"]
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert page.count("<svg") == 2  # a matrix of perplexity and one of KL
    assert "documentation, wanda, python-code:held-out: " in page


def test_calibration_files_of_ones_own(stories_model, stories, tmp_path):
    """The study with files of one's own: a calibration set and a held-out text per domain."""
    domains = {"stories": stories["calibration"], "held-out stories": stories["held_out"]}
    files = {}
    for name, texts in domains.items():
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text("\n".join(texts[:60]))
    plan = {
        "base": {
            "model": str(stories_model),
            "calibration": {"text": str(files["stories"]), "samples": 2, "length": 64},
            "stages": [{"prune": {"score": "wanda", "sparsity": 0.5}}],
            "measure": {"perplexity": [{"text": str(file), "name": name} for name, file in files.items()],
                        "window": 64, "windows": 2},
        },
        "vary": {"calibration set": {name: {"calibration.text": str(file)} for name, file in files.items()}},
    }  # fmt: skip
    rows = sparity.sweep(plan, output=tmp_path / "out").report.rows
    assert [[quality.text for quality in row.quality] for row in rows] == [list(files)] * 2
    assert rows[0].quality[0].perplexity != rows[1].quality[0].perplexity
