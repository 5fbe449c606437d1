"""`sparity sweep`: what it prints where, its exit code, and what it leaves on disk."""

import csv
import json
import os

import pytest

from sparity.errors import NumericalError
from sparity.pipeline.run.runner import execute
from sparity.pipeline.studies import sweeping

SPARSITY = "stages.0.prune.sparsity"


@pytest.fixture
def sweep_file(recipe_file, tmp_path):
    """A sweep of two scores and one sparsity, whose base is a recipe file."""
    path = tmp_path / "sweep.yaml"
    methods = {score: {"stages.0.prune.score": score} for score in ("magnitude", "wanda")}
    path.write_text(json.dumps({"base": str(recipe_file()), "vary": {"method": methods, SPARSITY: [0.5]}}))
    return path


def test_sweep(sparity, sweep_file, model, tmp_path):
    done = sparity("sweep", sweep_file, "-o", tmp_path / "out", "measure.windows=2", f"vary.{SPARSITY}=[0.25, 0.5]")
    assert done.code == 0
    assert done.err.splitlines()[0] == "checking 4 combinations ..."
    assert "3 of 4, wanda, 0.25: prune ..." in done.err.splitlines()
    lines = done.out.splitlines()
    assert lines[0] == "4 combinations of method (2) and sparsity (2)."
    assert [line.split()[:2] for line in lines[1:6]] == [
        ["method", "sparsity"], ["magnitude", "0.25"], ["magnitude", "0.5"], ["wanda", "0.25"], ["wanda", "0.5"],
    ]  # fmt: skip
    assert lines[-1] == f"saved to {tmp_path / 'out'}; page: {tmp_path / 'out' / 'sweep.html'}"
    assert sorted(os.listdir(tmp_path / "out")) == ["sweep.csv", "sweep.html", "sweep.json"]
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert {row["model"] for row in content["rows"]} == {str(model)}
    assert {row["recipe"]["measure"]["windows"] for row in content["rows"]} == {2}
    with (tmp_path / "out" / "sweep.csv").open(newline="") as file:
        assert [line["status"] for line in csv.DictReader(file)] == ["done"] * 4
    again = sparity("sweep", sweep_file, "-o", tmp_path / "out")
    assert (again.code, again.out) == (1, "")
    assert again.err.splitlines()[-1].startswith(f"error: {tmp_path / 'out'} exists already: choose another output")
    told = sparity("sweep", sweep_file, "-o", tmp_path / "out", "--force", "--json")
    assert told.json == json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert len(told.json["rows"]) == 2
    quiet = sparity("sweep", sweep_file, "-o", tmp_path / "out", "--force", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_a_model_by_its_exact_name(sparity, sweep_file, model, tmp_path):
    link = tmp_path / "my #1 model"
    link.symlink_to(model)
    told = sparity("sweep", sweep_file, "--model", link, "-o", tmp_path / "out", "--json").json
    assert {(row["model"], row["recipe"]["model"]) for row in told["rows"]} == {(str(link), str(link))}


def test_a_failed_combination_ends_in_exit_code_1(sparity, sweep_file, tmp_path, monkeypatch):
    def fail(recipe, *arguments, **named):
        if recipe.stages[0].score == "magnitude":
            raise NumericalError("model.layers.0 holds NaN")
        return execute(recipe, *arguments, **named)

    monkeypatch.setattr(sweeping, "execute", fail)
    done = sparity("sweep", sweep_file, "-o", tmp_path / "out")
    assert done.code == 1
    assert done.err.splitlines()[-1] == "failed: magnitude, 0.5: model.layers.0 holds NaN"
    assert "1 failed." in done.out
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
    assert [row["message"] for row in rows] == ["model.layers.0 holds NaN", None]
    quiet = sparity("sweep", sweep_file, "-o", tmp_path / "out", "--force", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (1, "", "failed: magnitude, 0.5: model.layers.0 holds NaN\n")


def test_an_interrupted_sweep_names_the_command_that_resumes(sparity, sweep_file, tmp_path, monkeypatch):
    def interrupt(recipe, *arguments, **named):
        if recipe.stages[0].score == "wanda":
            raise KeyboardInterrupt
        return execute(recipe, *arguments, **named)

    arguments = ["sweep", str(sweep_file), "-o", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["sparity", *arguments])
    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "execute", interrupt)
        done = sparity(*arguments)
    assert done.code == 130
    assert done.err.splitlines()[-1] == f"continue with: sparity sweep --resume {' '.join(arguments[1:])}"
    assert not (tmp_path / "out").exists()
    resumed = sparity("sweep", "--resume", *arguments[1:])
    assert resumed.code == 0
    assert not any(line.startswith("1 of 2") for line in resumed.err.splitlines())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"{SPARSITY}=0.3"], "would be lost, vary."),
        (["measure.window=4096"], 'combination "magnitude, 0.5": 4096 tokens per window are more than the model'),
        ([f"vary.{SPARSITY}=[]"], "no values: give at least one"),
    ],
)
def test_bad_input_is_one_line(sparity, sweep_file, tmp_path, overrides, words):
    before = sorted(os.listdir(tmp_path))
    done = sparity("sweep", sweep_file, *overrides, "-o", tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    line = done.err.replace("checking 2 combinations ...\n", "")
    assert line.startswith("error: ")
    assert words in line
    assert line.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before
    assert sparity("sweep", sweep_file).code == 2  # no output


def test_the_schema_of_sweeps(sparity):
    schema = sparity("schema", "sweep").json
    assert set(schema["properties"]) == {"base", "vary"}
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["base", "vary"]
    assert sparity("schema", "recipe").json == sparity("schema").json
    assert sparity("schema", "sweeps").code == 2
