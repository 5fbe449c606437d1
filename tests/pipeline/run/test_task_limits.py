"""Tasks in a recipe: what is asked, planned, judged and reported."""

import json
from pathlib import Path

import pytest

import sparity
from sparity.errors import InvalidInput
from sparity.measure.data.read_back import read_back
from sparity.measure.data.report import Report
from sparity.measure.data.task_comparison import TaskComparison
from sparity.measure.show.card import model_card
from sparity.measure.show.page_run import render_html
from sparity.measure.show.sentences_tasks import describe_needed
from sparity.measure.tasks.planning import needed_items
from sparity.measure.tasks.running import Settings, missing
from sparity.measure.tasks.section import limit_of
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.measured_tasks import judge_tasks
from sparity.pipeline.run.plan import plan
from sparity.quality.paired import items_needed
from sparity.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[3] / "recipes" / "eval").glob("*.yaml"))
STAGES = [{"prune": {"score": "magnitude", "sparsity": 0.5}}]
needs_harness = pytest.mark.skipif(missing() is not None, reason=f"{missing()}")


def seen(name, lost, won, items=1000, source="own file, official format"):
    return TaskComparison(name, source, "acc", items, 0.5, 0.5, (won - lost) / items, 0, 0, lost, won, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("words", "limit"),
    [("drop < 1 pt at 95 %", (0.01, 0.95)), ("drop < 2.5 pt at 90%", (0.025, 0.9)), ("drop  < 3 pt", (0.03, 0.95))],
)
def test_limits_are_read(words, limit):
    assert limit_of(words) == pytest.approx(limit)


@pytest.mark.parametrize("words", ["drop < 1", "1 pt", "drop < 0 pt", "drop < 200 pt", "drop < 1 pt at 100 %"])
def test_other_words_are_refused(words):
    with pytest.raises(ValueError, match=r"drop < 1 pt|between"):
        limit_of(words)


def test_a_limit_is_kept_where_the_sample_rules_out_as_large_a_drop():
    """10 lost and 10 won of 1000: the standard error is sqrt(20)/1000, so the limit is about 0.79 points."""
    (kept,) = judge_tasks({"piqa": "drop < 1 pt at 95 %"}, [seen("piqa", 10, 10)])
    (missed,) = judge_tasks({"piqa": "drop < 0.7 pt at 95 %"}, [seen("piqa", 10, 10)])
    (unsure,) = judge_tasks({"piqa": "drop < 1 pt at 99 %"}, [seen("piqa", 10, 10)])
    assert (kept.passed, missed.passed, unsure.passed) == (True, False, False)
    assert "+0.0 pt; 1,000 items do not rule out a drop of 0.8" in kept.reached
    (few,) = judge_tasks({"piqa": "drop < 1 pt at 95 %"}, [seen("piqa", 0, 0, items=100)])
    assert not few.passed  # nothing was lost, and the sample is too small to say so


def test_a_limit_on_what_was_not_asked_is_missed():
    (found,) = judge_tasks({"hub:piqa": "drop < 1 pt"}, [seen("piqa", 0, 0)])
    assert (found.passed, found.reached) == (False, "not measured")


def test_the_planner_says_how_many_items_a_limit_needs(tmp_path):
    (tmp_path / "llm-foundry-eval").mkdir()
    (tmp_path / "llm-foundry-eval" / "piqa.jsonl").write_text("{}\n" * 50)
    found = needed_items("piqa", "drop < 1 pt at 95 %", Settings(data=str(tmp_path)))
    assert (found.items, found.needed[0.1], found.hopeless) == (50, items_needed(0.01, 0.1), True)
    assert "there are 50: too few" in describe_needed(found)
    assert needed_items("passkey", "drop < 20 pt", Settings(items=400, limit=300)).items == 300
    unknown = needed_items("hub:piqa", "drop < 1 pt", Settings())
    assert (unknown.items, unknown.hopeless) == (None, False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_evaluation_are_valid(path):
    recipe = Recipe.read(path)
    assert recipe.accept.tasks
    assert set(recipe.accept.tasks) <= set(recipe.measure.tasks.names)
    assert Recipe.read(recipe.summary()) == recipe
    assert f"run {path.relative_to(path.parents[2])} -o OUT" in path.read_text()


def test_a_limit_needs_its_task():
    recipe = {"model": "zoo:llama", "stages": STAGES, "accept": {"piqa": "drop < 1 pt"}}
    with pytest.raises(InvalidInput, match=r"accept\.piqa: the task is not asked"):
        Recipe.read(recipe)
    with pytest.raises(InvalidInput, match="unknown key"):
        Recipe.read({**recipe, "accept": {"piqua": "drop < 1 pt"}})
    assert "piqa" in json.dumps(Recipe.model_json_schema()["$defs"]["Accept"])


@needs_harness
def test_a_model_without_a_tokenizer_is_refused_before_any_work(tiny_llama_folder):
    recipe = {"model": str(tiny_llama_folder), "stages": STAGES, "measure": {"speed": None, "tasks": ["passkey"]}}
    with pytest.raises(InvalidInput, match="no tokenizer"):
        prepare(Recipe.read(recipe))


@needs_harness
def test_a_run_asks_both_models_and_reports_what_it_found(tmp_path):
    recipe = {
        "model": "zoo:llama",
        "dtype": "float32",
        "stages": [{"prune": {"score": "random", "sparsity": 0.9}}],
        "measure": {"speed": None, "tasks": {"names": ["passkey"], "items": 6, "context": 64}},
        "accept": {"passkey": "drop < 1 pt at 95 %"},
    }
    (planned,) = plan(prepare(Recipe.read(recipe))).tasks
    assert (planned.items, planned.hopeless) == (6, True)
    report = sparity.run(recipe, output=tmp_path / "out").report
    (candidate,) = report.candidates
    (found,) = candidate.tasks
    assert (found.name, found.source, found.items) == ("passkey", "made here", 6)
    assert found.first > 0.8
    assert found.change == pytest.approx((found.won - found.lost) / 6)
    (verdict,) = candidate.verdicts
    assert not verdict.passed
    assert report.accepted is False
    assert any(note.startswith("passkey: 0-shot; definition 1.0; read each question") for note in candidate.notes)
    assert read_back(Report, report.to_dict(), Path("x")).candidates[0].tasks == candidate.tasks
    page, card = render_html(report), model_card(report, candidate)
    assert "<h3>Tasks: " in page
    assert "passkey<small>made here</small>" in page
    assert "## Tasks" in card
    assert "| passkey | made here | acc | 6 |" in card


@needs_harness
def test_a_policy_in_a_recipe_shows_in_its_tasks(tmp_path):
    """A cache that keeps nothing: the saved model is read in steps, and so is the dense one beside it."""
    recipe = {
        "model": "zoo:llama",
        "dtype": "float32",
        "stages": [{"cache": {"policy": "drop_all", "keep": 0.5, "sinks": 0, "recent": 0}}],
        "measure": {"speed": None, "tasks": {"names": ["passkey"], "items": 8, "context": 64}},
    }
    (candidate,) = sparity.run(recipe, output=tmp_path / "out").report.candidates
    (found,) = candidate.tasks
    assert found.first > 0.8
    assert found.second <= 0.5
    assert any("read the question into the cache" in note for note in candidate.notes)
