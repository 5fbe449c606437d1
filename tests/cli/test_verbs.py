"""Every verb: what it prints where, its exit code, and what it leaves on disk."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import sparity as package
from gguf_models import tiny_llama, write
from sparity import registry
from sparity.cli import demo as demo_verb
from sparity.models import fetched
from sparity.recipe import Recipe

KINDS = ("budget", "family", "prune.pattern", "prune.score", "prune.solver")
PLUGINS = [(kind, name) for kind in KINDS for name in registry.names(kind)]


def zeros(report):
    return report["candidates"][0]["sparsity"]


def test_the_verbs_are_listed(sparity):
    shown = sparity("--help").out
    for verb in ("prune", "run", "plan", "eval", "verify", "methods", "explain", "schema", "doctor", "demo"):
        assert re.search(rf"^\W*{verb} ", shown, re.MULTILINE)
        assert sparity(verb, "--help").code == 0
    assert sparity("--version").out.strip() == package.__version__
    assert sparity("prnue").code == 2
    assert sparity("run").code == 2


def test_prune(sparity, model, token_files, tmp_path):
    shared = ("--text", token_files["calibration"], "--measure", token_files["text"])
    done = sparity("prune", model, "-o", tmp_path / "out", "--score", "wanda", "--sparsity", 0.25, "--json", *shared)
    assert done.code == 0
    report = done.json
    assert zeros(report) == 0.25
    assert report["model"] == str(model)
    candidate = report["candidates"][0]
    assert candidate["speed"]["dense"]["decode"]["median"] > 0
    quality = candidate["quality"][0]
    assert quality["change"] == quality["perplexity"] / quality["dense_perplexity"] - 1 != 0
    assert json.loads((tmp_path / "out" / "sparity.json").read_text())["report"] == report
    assert "<html" in (tmp_path / "out" / "report.html").read_text()[:200]
    again = sparity("prune", model, "-o", tmp_path / "out", *shared)
    assert again.code == 1
    refusal = f"error: {tmp_path / 'out'} exists already: choose another output or pass --force to replace it"
    assert again.err.splitlines() == ["checking ...", refusal]
    forced = sparity(
        "prune", model, "-o", tmp_path / "out", "--force", "--pattern", "2:4", "--score", "magnitude", *shared
    )
    assert forced.code == 0
    assert f"saved to {tmp_path / 'out'}; page: {tmp_path / 'out' / 'report.html'}" in forced.out
    assert "magnitude, 2 of 4 kept" in " ".join(forced.out.split())
    assert zeros(json.loads((tmp_path / "out" / "sparity.json").read_text())["report"]) == 0.5


def test_run_with_overrides(sparity, recipe_file, tmp_path):
    path = recipe_file({"score": "magnitude", "sparsity": 0.5})
    overrides = ("stages.0.prune.sparsity=1e-1", "stages.0.prune.score=wanda", "measure.window=16", "dtype=bfloat16")
    report = sparity("run", path, *overrides, "-o", tmp_path / "out", "--json").json
    assert zeros(report) == pytest.approx(0.09375, abs=0.005)  # int(32 * 0.1) of 32 columns, int(64 * 0.1) of 64
    assert report["candidates"][0]["quality"][0]["window"] == 16
    assert report["dtype"] == "bfloat16"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_run_takes_a_model_by_its_exact_name(sparity, recipe_file, model, tmp_path):
    """Not as YAML, in which a number or a space with a # would mean something else."""
    for name in ("123", "my #1 model"):
        link = tmp_path / name
        link.symlink_to(model)
        path = recipe_file({"score": "magnitude"}, model="no/model", measure={"speed": None})
        plan = sparity("plan", path, "--model", link, "--json").json
        assert plan["model"] == str(link)
        report = sparity("run", path, "--model", link, "-o", tmp_path / f"{name} out", "--json").json
        assert report["model"] == str(link)
        assert report["candidates"][0]["recipe"]["model"] == str(link)


def test_quiet_prints_nothing(sparity, recipe_file, tmp_path, model, token_files, capfd):
    path = recipe_file()
    done = sparity("run", path, "-o", tmp_path / "out", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    done = sparity("verify", tmp_path / "out", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert tuple(capfd.readouterr()) == ("", "")  # what the libraries print does not come either


def test_missed_limits_end_in_exit_code_1(sparity, recipe_file, tmp_path):
    path = recipe_file({"sparsity": 0.9}, accept={"perplexity": "+0.1%", "kl": 100, "decode": "1.3x"})
    done = sparity("run", path, "-o", tmp_path / "out", "--quiet")
    assert done.code == 1
    first, second = done.err.splitlines()
    assert re.fullmatch(r"not accepted: perplexity at most \+0\.1%, reached \+[0-9.]+%", first)
    assert second == "not accepted: decode at least 1.3x, reached not measured"
    assert (tmp_path / "out" / "sparity.json").exists()
    told = sparity("run", path, "-o", tmp_path / "told", "--json")
    assert (told.code, told.err.splitlines()[-2:]) == (1, [first, second])
    verdicts = told.json["candidates"][0]["verdicts"]
    assert [verdict["passed"] for verdict in verdicts] == [False, True, False]
    assert sparity("run", path, "accept.perplexity=+1000000%", "accept.decode=null", "-o", tmp_path / "kept").code == 0


def test_plan_writes_nothing(sparity, recipe_file, tmp_path, model):
    path = recipe_file({"pattern": "2:4", "dense": ["*.0.*"]})
    before = sorted(tmp_path.iterdir())
    plan = sparity("plan", path, "--json").json
    (stage,) = plan["stages"]
    assert (stage["name"], stage["number"], len(stage["changes"])) == ("prune", 1, 21)
    site = next(site for site in stage["changes"] if site["name"] == "model.layers.1.mlp.down_proj")
    assert (site["role"], site["shape_before"], site["shape_after"], site["target"]) == (
        "down",
        [32, 64],
        [32, 64],
        0.5,
    )
    assert next(site for site in stage["changes"] if ".0." in site["name"])["target"] == 0
    assert stage["statistics"] == ["column_norm"]
    assert stage["parameters"] == package.load(model).num_parameters()
    assert (plan["samples"], plan["length"]) == (6, 24)
    assert plan["peak_memory"] == sum(plan["memory"].values()) > 0
    assert plan["output_bytes"] == 4 * package.load(model).num_parameters()
    shown = " ".join(sparity("plan", path).out.split())
    assert "wanda, 2 of 4 kept" in shown
    assert "statistics: column_norm; time, about" in shown
    assert "calibration: 6 samples of 24 tokens memory, about" in shown
    assert sorted(tmp_path.iterdir()) == before
    refused = sparity("plan", path, "stages.0.prune.pattern=3:5")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("error: model.layers.1.self_attn.q_proj: 5 does not divide its 32 input columns")


def test_eval(sparity, model, token_files):
    alone = sparity("eval", model, "--text", token_files["text"], "--window", 32, "--json").json
    (row,) = alone["quality"]
    ids = np.load(token_files["text"])
    assert row["perplexity"] == package.perplexity(package.load(model), ids, 32)
    assert (row["text"], row["window"], alone["speed"]) == ("text", 32, None)
    few = sparity("eval", model, "--text", token_files["text"], "--window", 32, "--windows", 2, "--json").json
    assert few["quality"][0]["perplexity"] == package.perplexity(package.load(model), ids[:64], 32)
    both = sparity("eval", model, "--against", model, "--text", token_files["text"], "--window", 32, "--json").json
    (row,) = both["quality"]
    assert (row["kl"], row["top1"]) == (0, 1)
    assert row["perplexity"] == row["dense_perplexity"]
    assert both["speed"]["prompt"] == 64
    shown = sparity("eval", model, "--text", token_files["text"], "--window", 32)
    assert (shown.code, shown.err) == (0, "")
    assert f"{alone['quality'][0]['perplexity']:.4f}" in shown.out
    assert sparity("eval", model, "--text", "none.npy").err == "error: token file none.npy does not exist\n"


def test_doctor(sparity, monkeypatch):
    found = sparity("doctor", "--json")
    assert found.code == 0
    assert found.json["bundled model"] == "works"
    assert found.json["sparity"] == package.__version__
    assert found.json["bfloat16 products"] == "own type (not timed: SPARITY_CHOICE=rules)"
    assert "bundled model" in sparity("doctor").out
    monkeypatch.setattr("sparity.cli.doctor.EXTRAS", {"data": ("no_such_package",)})
    assert "pip install 'sparity[data]'" in " ".join(sparity("doctor").out.split())
    monkeypatch.setattr("sparity.zoo.path", lambda name: Path("nowhere"))
    broken = sparity("doctor", "--json")
    assert broken.code == 1
    assert broken.json["bundled model"].startswith("does not load: model nowhere: this path does not exist")


def test_demo_of_a_real_model(sparity, tmp_path, monkeypatch):
    """With a tiny chat model in its place: all are timed in turns, and each answers what it is asked."""
    monkeypatch.setenv("SPARITY_CACHE", str(tmp_path / "cache"))
    for stage in demo_verb.REAL_STAGES:
        Recipe.read({**demo_verb.REAL_SHARED, "stages": [{"prune": stage}]})
    assert demo_verb.REAL_SHARED["model"] == "zoo:smollm2"
    file = write(tmp_path / "model.gguf", tiny_llama(max_position_embeddings=256, head_dim=8))
    small = {
        **demo_verb.REAL_SHARED,
        "model": str(file),
        "calibration": {"text": "python-docs", "documents": "joined", "samples": 2, "length": 32},
        "measure": {"perplexity": ["python-docs:held-out"], "window": 32, "windows": 2, "speed": None},
    }
    monkeypatch.setattr(demo_verb, "REAL_SHARED", small)
    monkeypatch.setattr(fetched, "is_fetched", lambda name: name == "smollm2")
    done = sparity("demo", "-o", tmp_path / "demo")
    assert done.code == 0
    report = json.loads((tmp_path / "demo/report.json").read_text())
    contestants = {one["name"]: one for one in report["contestants"]}
    pruned = [candidate["name"] for candidate in report["candidates"]]
    assert list(contestants) == ["dense, in transformers", "dense, on the engine", *pruned]
    assert [one["kind"] for one in contestants.values()] == ["dense"] * 2 + ["sparse"] * 3
    for candidate in report["candidates"]:
        assert contestants[candidate["name"]]["perplexity"] == candidate["quality"][0]["perplexity"]
        assert contestants["dense, on the engine"]["perplexity"] == candidate["quality"][0]["dense_perplexity"]
    assert all(0 < one["rate"]["low"] <= one["rate"]["median"] <= one["rate"]["high"] for one in contestants.values())
    assert [list(one["answers"]) for one in contestants.values()] == [[]] + [list(demo_verb.PROMPTS)] * 4
    page = (tmp_path / "demo/report.html").read_text()
    for prompt in demo_verb.PROMPTS:
        assert prompt in page
        assert f"\n{prompt}\n" in done.out
    assert "Quality against speed</h2>" in page
    assert "All run in bfloat16, in turns; perplexity in bfloat16." in page
    assert page.count("In turns with all others it decodes ") == 3
    assert "not measured" not in page
    assert "plain export" not in page


def test_demo(sparity, model, token_files, tmp_path, monkeypatch):
    for stage in demo_verb.STAGES:
        Recipe.read({**demo_verb.SHARED, "stages": [{"prune": stage}]})
    assert len(demo_verb.STAGES) == 6
    assert (demo_verb.SHARED["dtype"], demo_verb.SHARED["output"]) == ("bfloat16", {"format": "packed"})
    small = {
        "model": str(model),
        "calibration": {"tokens": token_files["calibration"]},
        "measure": {"perplexity": [token_files["text"]], "window": 32, "speed": None},
    }
    monkeypatch.setattr(demo_verb, "SHARED", small)
    monkeypatch.setattr(demo_verb, "STAGES", demo_verb.STAGES[3:5])
    monkeypatch.setattr("sparity.measure.timing.random_model.available_memory", lambda: 10**9)
    monkeypatch.setattr(fetched, "is_fetched", lambda name: False)
    done = sparity("demo", "-o", tmp_path / "a" / "demo", "--json")
    assert done.err.startswith("zoo:smollm2 is not here (sparity fetch smollm2): this is the bundled model")
    report = done.json
    assert report["contestants"] == []
    assert [candidate["name"] for candidate in report["candidates"]] == ["magnitude, 2 of 4 kept", "wanda, 2 of 4 kept"]
    assert json.loads((tmp_path / "a" / "demo" / "report.json").read_text()) == report
    assert "<html" in (tmp_path / "a" / "demo" / "report.html").read_text()[:200]
    assert report["larger"]["speed"] is None
    assert "4.0 GB is needed" in report["larger"]["skipped"] or "no compiled kernels" in report["larger"]["skipped"]
    (tmp_path / "file").write_text("the only copy")
    monkeypatch.setattr("sparity.pipeline.run.runner.execute", lambda *_, **__: pytest.fail("work before the check"))
    refused = sparity("demo", "--bundled", "-o", tmp_path / "file")
    assert (refused.code, refused.err) == (1, f"error: cannot create the folder {tmp_path / 'file'}: File exists\n")
    assert (tmp_path / "file").read_text() == "the only copy"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--score", "wnda"), 'no score "wnda"; did you mean "wanda"?'),
        (("--solver", "sparsgpt"), 'no solver "sparsgpt"; did you mean "sparsegpt"?'),
        (("--pattern", "5:4"), "pattern 5:4: N weights are kept of M"),
        (("--sparsity", "1.0"), "sparsity 1.0: it is the share of weights to remove and must lie in [0, 1)"),
        (("--sparsity", "nan"), "sparsity nan"),
        (("--sparsity", "-0.1"), "sparsity -0.1"),
        (("--measure", "none.txt"), "text file none.txt does not exist"),
        (("--dtype", "int8"), "dtype: Input should be"),
        (("--device", "meta"), "device 'meta' cannot be used"),
    ],
)
def test_bad_input_is_one_line(sparity, stories_model, stories, tmp_path, arguments, words):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(stories["held_out"][:20]))
    shared = ("--text", text, "--samples", 2, "--length", 32, "--measure", text)
    done = sparity("prune", stories_model, "-o", tmp_path / "out", *shared, *arguments)
    assert (done.code, done.out) == (1, "")
    line = done.err.replace("checking ...\n", "")
    assert line.startswith(f"error: {words}") or (line.startswith("error: recipe: ") and words in line)
    assert line.count("\n") == 1
    assert list(tmp_path.iterdir()) == [text]
    assert sparity("prune", stories_model, "-o", tmp_path / "out", "--sparsity", "abc").code == 2


@pytest.mark.parametrize(
    ("verb", "words"),
    [("run", "no output: pass -o FOLDER or set"), ("plan", "stages.0.prune.sparsity: expected a num")],
)
def test_a_recipe_file_that_is_wrong(sparity, recipe_file, verb, words):
    path = recipe_file({} if verb == "run" else {"sparsity": True})
    done = sparity(verb, path)
    assert (done.code, done.out) == (1, "")
    assert words in done.err
