"""`sparity compare` and `sparity eval --tasks`: the options that reach what is measured."""

import json

import pytest

from sparity.measure.tasks.running import missing


def test_compare(sparity, tmp_path):
    small = ("--window", 64, "--windows", 2, "--no-speed")
    done = sparity("compare", "zoo:llama", "zoo:relu", *small, "-o", tmp_path / "out", "--json")
    assert done.code == 0
    report = done.json
    assert report == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [model["name"] for model in report["models"]] == ["zoo:llama", "zoo:relu"]
    assert report["models"][1]["quality"][0]["kl"] > 0
    assert "zoo:relu" in (tmp_path / "out" / "compare.html").read_text()
    again = sparity("compare", "zoo:llama", "zoo:relu", *small, "-o", tmp_path / "out")
    assert again.code == 1
    assert "holds a comparison already" in again.err


def test_what_is_refused(sparity):
    done = sparity("compare", "zoo:llama")
    assert (done.code, "at least two" in done.err) == (1, True)
    done = sparity("eval", "zoo:llama", "--tasks", "arc_esy")
    assert (done.code, 'did you mean "arc_easy"' in done.err) == (1, True)


@pytest.mark.skipif(missing() is not None, reason=f"{missing()}")
def test_eval_of_tasks_beside_another_model(sparity):
    options = ("--tasks", "passkey", "--items", 3, "--context", 64)
    done = sparity("eval", "zoo:llama", "--against", "zoo:relu", *options, "--json")
    assert done.code == 0
    assert done.json["quality"] == []
    (task,) = done.json["tasks"]
    assert (task["name"], len(task["scores"][0]["items"])) == ("passkey", 3)
    (found,) = done.json["differences"]
    assert found["second"] == task["scores"][0]["value"]
    printed = sparity("eval", "zoo:llama", *options).out
    assert "passkey (made here)" in printed
    assert "passkey: 0-shot; definition 1.0" in printed
    done = sparity("eval", "zoo:llama", *options, "--way", "backwards")
    assert (done.code, "whole or steps" in done.err) == (1, True)
