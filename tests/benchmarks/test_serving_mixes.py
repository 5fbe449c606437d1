"""Random mixes of requests against each alone: that they are equal, and that the benchmark sees where they are not."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from sparity.engine.kernels import native
from sparity.serve.execution.steps import Steps
from sparity.serve.sampling import Chooser

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import serving_mixes

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")


@pytest.fixture(scope="module", params=["dense", "bitmask", "int8", "teal"])
def subject(request):
    with ExitStack() as closing:
        yield serving_mixes.Subject(request.param, "zoo:llama", closing, orders=25)


@pytest.fixture(scope="module")
def dense():
    return serving_mixes.Subject("dense", "zoo:llama", ExitStack(), orders=25)


def test_each_answer_of_a_mix_is_that_of_its_request_alone(subject):
    found = [serving_mixes.batch(subject, name, 6) for name in ("0 6", "0 24")]  # both with blocks of beginnings
    told = serving_mixes.summary(found)
    assert (told["different"], told["mixes"], [each["slots"] for each in found]) == (0, 12, [6, 3])
    assert told["compared"] + told["left"] == told["requests"]
    assert min(told[name] for name in ("left", "drawn", "ended by stop", "ended by length")) > 0
    assert all(each["counts"]["reused_tokens"] >= 64 for each in found)


def test_a_product_that_depends_on_who_is_beside_it_is_found(dense, monkeypatch):
    run = Steps.run
    monkeypatch.setattr(
        Steps, "run", lambda steps, parts: [one * (1 + 1e-6 * (len(parts) > 1)) for one in run(steps, parts)]
    )
    assert serving_mixes.batch(dense, "0 6", 3)["different"]


def test_draws_that_are_shared_are_found(dense, monkeypatch):
    begin, shared = Chooser.__init__, []

    def one_for_all(chooser, sampling, prompt):
        begin(chooser, sampling, prompt)
        shared.append(chooser._draws)
        chooser._draws = shared[0]

    monkeypatch.setattr(Chooser, "__init__", one_for_all)
    different = serving_mixes.batch(dense, "0 6", 3)["different"]
    assert different
    assert {"mix", "asked", "order", "together", "alone"} == set(different[0])


def test_a_known_beginning_of_another_text_is_found(dense, monkeypatch):
    monkeypatch.setattr("sparity.serve.prefixes._keys", lambda ids: (str(at) for at in range(len(ids) // 64)))
    assert serving_mixes.batch(dense, "0 24", 6)["different"]


def test_it_goes_on_where_it_ended(tmp_path, monkeypatch, capsys):
    out = tmp_path / "mixes.json"

    def run(*more):
        arguments = ["serving_mixes.py", str(out), "--forms", "dense", "--orders", "9", *more]
        monkeypatch.setattr(sys, "argv", arguments)
        return serving_mixes.main()

    assert run("--mixes", "4", "--each", "2") == 0
    first = json.loads(out.read_text())
    assert (len(first["batches"]), first["summary"]["mixes"], first["summary"]["different"]) == (2, 4, 0)
    assert run("--mixes", "6", "--each", "2") == 0
    second = json.loads(out.read_text())
    assert second["batches"][:2] == first["batches"]
    assert second["summary"]["mixes"] == 6
    capsys.readouterr()
    assert run("--only", "1", "--each", "2") == 0
    assert f"'compared': {first['batches'][1]['counts']['compared']}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is of other settings"):
        run("--mixes", "6", "--each", "3")
