"""Models beside each other: what is measured of each, the table, the page and the JSON."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console

import sparity
from pages import Page
from sparity.errors import InvalidInput
from sparity.measure.data.bench_report import BenchReport, Ratio, Runner, Timing
from sparity.measure.data.comparison_report import Compared, ComparisonReport, inverted
from sparity.measure.data.report import Pace, Quality, Spread
from sparity.measure.data.task_comparison import TaskComparison
from sparity.measure.data.task_report import TaskResult, TaskScore
from sparity.measure.show.page_compare import render_comparison
from sparity.measure.show.table_compare import print_comparison
from sparity.measure.timing.bench import Protocol
from sparity.pipeline.run.tokens import MeasuredText
from sparity.pipeline.studies import comparing
from sparity.pipeline.studies.comparing import Asked, compare_models

IDS = torch.randint(0, 97, (96,), generator=torch.Generator().manual_seed(0))


def texts(model, tokenizer):
    return [MeasuredText("<text>", IDS, 24)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, family_models):
    """A tiny Llama, the same again, and one whose largest matrices have lost half of their weights."""
    folder, model = tmp_path_factory.mktemp("compared"), copy.deepcopy(family_models["llama"])
    for name in ("dense", "same"):
        model.save_pretrained(folder / name)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.down_proj.weight
            weight *= weight.abs() > weight.abs().median()
    model.save_pretrained(folder / "sparse")
    return [str(folder / name) for name in ("dense", "same", "sparse")]


def test_quality_is_measured_beside_the_first(folders):
    report = compare_models(folders, texts, Asked())
    dense, same, sparse = report.models
    expected = [sparity.perplexity(sparity.load(folder), IDS, 24) for folder in folders]
    assert [model.quality[0].perplexity for model in report.models] == pytest.approx(expected)
    for model in (dense, same):
        assert (model.quality[0].kl, model.quality[0].top1) == (pytest.approx(0, abs=1e-7), 1)
    assert sparse.quality[0].kl > 1e-5
    assert sparse.quality[0].dense_perplexity == pytest.approx(expected[0])
    weights = sparity.load(folders[2]).state_dict()
    assert sparse.zeros == sum(int((each == 0).sum()) for each in weights.values()) / sparse.parameters
    assert dense.zeros < sparse.zeros
    assert report.speed is None
    assert report.contestants() == ()
    assert "Quality against speed" not in render_comparison(report)


def test_speed_is_that_of_one_benchmark_with_the_first_as_its_subject(folders, monkeypatch):
    asked = []

    def bench(every, ids, protocol, phase):
        asked.append(([contender.name for contender in every], [contender.how for contender in every], protocol))
        return "measured"

    monkeypatch.setattr(comparing, "bench", bench)
    protocol = Protocol(8, 4, 2, (1,))
    assert compare_models(folders[:2], texts, Asked(speed=protocol)).speed == "measured"
    assert asked == [([folders[1], folders[0]], ["engine"] * 2, protocol)]


@pytest.mark.parametrize("names", [["zoo:llama"], [], ["zoo:llama", "zoo:llama"]])
def test_two_different_models_are_needed(names):
    with pytest.raises(InvalidInput, match="at least two different"):
        compare_models(names, texts, Asked())


def test_models_of_another_vocabulary_are_refused(folders):
    with pytest.raises(InvalidInput, match=r"97 tokens .* zoo:llama 8,192"):
        compare_models([folders[0], "zoo:llama"], texts, Asked())


def spread(value):
    return Spread(value, value * 0.9, value * 1.1)


def quality(perplexity, kl):
    return Quality("<text>", 24, 92, 10.0, perplexity, perplexity / 10 - 1, "good", kl, 0.9)


@pytest.fixture(scope="module")
def report():
    """Three models by hand: the second is twice as fast and a little worse, the third slower and worse than both."""
    rates = {"<dense>": 100.0, "fast": 200.0, "beaten": 50.0}
    timings = tuple(
        Timing(name, 1, Pace(spread(0.1), spread(rate)), spread(1 / rate), 50_000_000) for name, rate in rates.items()
    )
    ratios = tuple(
        Ratio(name, 1, Spread(100 / rates[name], 90 / rates[name], 120 / rates[name]), spread(1.0))
        for name in ("fast", "beaten")
    )
    runners = tuple(Runner(name, "engine", 1_000_000) for name in rates)
    speed = BenchReport("<dense>", "Llama", 8, 4, 2, 1, True, runners, timings, ratios, (), ("A note.",))
    score = TaskScore("acc", 0.75, 0.05, (1.0, 1.0, 1.0, 0.0))
    task = TaskResult("piqa", "own file, official format", "1.0", 0, "whole", 0, ("a", "b", "c", "d"), (score,))
    lost = TaskComparison("piqa", task.source, "acc", 4, 0.75, 0.5, -0.25, -0.75, 0.0, 1, 0, 1.0, 0.7, 0.9)
    models = (
        Compared("<dense>", 1000, 8000, 0.0, (), (quality(10.0, 0.0),), (task,)),
        Compared("fast", 1000, 8000, 0.5, ("packed", "cache"), (quality(10.5, 0.01),), (task,), (lost,)),
        Compared("beaten", 1000, 8000, 0.5, (), (quality(12.0, 0.2),), (task,), (lost,)),
    )
    return ComparisonReport(models, speed, ("piqa: 0-shot.",), {})


def test_ratios_are_those_of_the_models_to_the_first(report):
    assert report.faster("<dense>") is None
    assert report.faster("fast") == Spread(2.0, pytest.approx(200 / 120), pytest.approx(200 / 90))
    assert inverted(Spread(0.5, 0.25, 1.0)) == Spread(2.0, 1.0, 4.0)


def test_the_page_shows_every_model_once_in_each_table_and_the_front(report):
    page = render_comparison(report)
    text = Page(page).text
    assert "2.00x, faster" in text
    assert "0.50x, slower" in text
    assert "A ratio above 1x means that the model of that row is faster." in text
    assert "beaten by fast" in text
    assert "-25.0 pt [-75.0, +0.0]" in text
    assert "no difference seen; 4 items show 90.0 pt or more" in text
    assert "<dense>" not in page.replace("&lt;dense&gt;", "")
    assert "packed, cache" in text
    assert page.count("<svg") == 1


def test_the_table_fits_80_columns(report):
    out = io.StringIO()
    print_comparison(report, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "beaten is beaten in speed and perplexity by fast." in lines
    assert any("2.00x, faster" in line and "fast" in line for line in lines)


def test_the_json_has_all_but_the_single_items(report):
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [model["name"] for model in content["models"]] == ["<dense>", "fast", "beaten"]
    assert content["models"][1]["differences"][0]["lost"] == 1
    assert content["models"][0]["tasks"][0]["scores"] == {"acc": 0.75}
    assert content["speed"]["ratios"][0]["against"] == "fast"
    assert "items" not in content["models"][0]["tasks"][0]
