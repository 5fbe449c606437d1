"""Events of a run and what the trackers' adapters call, with a recorder in the place of each library."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from sparity.errors import InvalidInput
from sparity.integrations import tracking
from sparity.pipeline.run.runner import execute
from sparity.recipe import Recipe


@pytest.fixture(scope="module")
def run(tiny_llama_folder, token_files, tmp_path_factory):
    """The events of a small run, and its report."""
    recipe = Recipe.read(
        {
            "model": str(tiny_llama_folder),
            "calibration": {"tokens": token_files["calibration"], "batch": 3},
            "stages": [{"prune": {"score": "wanda"}}],
            "measure": {"perplexity": [token_files["text"]], "window": 32, "windows": 2, "speed": None},
        }
    )
    events = []
    told = tracking.Told(events.append)
    report = execute(recipe, told, output=tmp_path_factory.mktemp("run") / "out", device="cpu").report
    told.result(report)
    return events, report


def test_a_run_tells_its_phases_blocks_and_result_in_order(run):
    events, report = run
    assert events[0] == tracking.Event("phase", 0, "checking")
    blocks = [event for event in events if event.name == "block"]
    assert [event.step for event in blocks] == [1, 2, 3]
    assert all(event.numbers["seconds_per_block"] > 0 for event in blocks)
    assert [event.step for event in events] == sorted(event.step for event in events)
    assert [event.name for event in events].count("result") == 1
    candidate, quality = report.candidates[0], report.candidates[0].quality[0]
    assert events[-1].words == candidate.name
    assert events[-1].numbers == {
        "sparsity": candidate.sparsity,
        "model_sparsity": candidate.model_sparsity,
        "parameters": candidate.parameters,
        "bytes_dense": candidate.bytes_dense,
        "bytes_sparse": candidate.bytes_sparse,
        "dense_perplexity/text": quality.dense_perplexity,
        "perplexity/text": quality.perplexity,
        "kl/text": quality.kl,
    }


def test_another_progress_hears_the_same():
    heard = []
    other = SimpleNamespace(phase=heard.append, block=lambda *block: heard.append(block))
    told = tracking.Told(lambda event: None, other)
    told.phase("pruning")
    told.block(1, 3, 0.5)
    assert heard == ["pruning", (1, 3, 0.5)]


def recorder(calls, *names):
    """A library that notes its calls."""
    note = lambda name: lambda *given, **named: calls.append((name, *given, *named.items()))  # noqa: E731
    return SimpleNamespace(**{name: note(name) for name in names})


EVENTS = (
    tracking.Event("phase", 0, "pruning"),
    tracking.Event("block", 1, numbers={"seconds_per_block": 0.5}),
    tracking.Event("result", 1, "wanda", {"kl/python-docs:held-out": 0.25}),
)


def error():
    """An exception as a context is told of it."""
    found = KeyboardInterrupt()
    return type(found), found, None


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_numbers_by_step_and_are_finished(name, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, name, recorder(calls, "init", "log", "finish"))
    stopped = tracking.tracker(name, "sparse", {"model": "m"})
    hook = stopped.__enter__()
    for event in EVENTS:
        hook(event)
    assert not stopped.__exit__(*error())  # whatever ends the run, it goes on to whom it concerns
    assert calls == [
        ("init", ("project", "sparse"), ("config", {"model": "m"})),
        ("log", {"seconds_per_block": 0.5}, ("step", 1)),
        ("log", {"kl/python-docs:held-out": 0.25}, ("step", 1)),
        ("finish",),
    ]


def test_mlflow_gets_names_that_it_takes_within_a_run(monkeypatch):
    calls = []
    library = recorder(calls, "set_experiment", "log_dict", "log_metrics")

    @contextmanager
    def start_run():
        calls.append("begun")
        yield
        calls.append("ended")

    library.start_run = start_run
    monkeypatch.setitem(sys.modules, "mlflow", library)
    with tracking.tracker("mlflow", "sparse", {"model": "m"}) as hook:
        for event in EVENTS:
            hook(event)
    assert calls == [
        ("set_experiment", "sparse"),
        "begun",
        ("log_dict", {"model": "m"}, "recipe.json"),
        ("log_metrics", {"seconds_per_block": 0.5}, ("step", 1)),
        ("log_metrics", {"kl/python-docs-held-out": 0.25}, ("step", 1)),
        "ended",
    ]


def test_what_cannot_be_tracked_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for name, words in (("wandb", "wandb is not installed: pip install wandb"), ("wandbb", 'no tracker "wandbb"')):
        with pytest.raises(InvalidInput, match=words), tracking.tracker(name, "sparse", {}):
            pass
