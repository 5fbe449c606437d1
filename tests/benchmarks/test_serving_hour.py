"""The hour of load, for seconds: right answers, what it notices, and how growth of memory is told."""

import asyncio
import copy
import sys
from pathlib import Path

import numpy as np
import pytest

from served_http import open_llama, serving
from sparity.engine.kernels import native

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import serving_hour
from serving_requests import BAD, good

POOL = 6
compiled = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")


@pytest.fixture(scope="module")
def server():
    with serving([open_llama()]) as served:
        yield served


@pytest.fixture(scope="module")
def alone(server):
    return asyncio.run(serving_hour.answers_alone(server.url, POOL))


@pytest.fixture
def clients(server, alone):
    """A function that lets clients come with one request each, all at once."""

    def run(kinds):
        load = serving_hour.Load(server.url, alone, seed=1)

        async def all_kinds():
            async with serving_hour.httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                await asyncio.gather(*(getattr(load, kind)(client) for kind in kinds))

        asyncio.run(all_kinds())
        return load

    return run


@compiled
def test_answers_beside_others_streamed_or_whole(clients, server):
    load = clients(["known"] * 10 + ["new"] * 2 + ["leave"] * 4 + ["bad"] * 6)
    assert (load.errors, load.changed, load.counts["answers compared"]) == ([], [], 12)
    assert asyncio.run(serving_hour.held(server.url)) == 0


@compiled
def test_the_whole_load_counts_what_it_does(server, alone):
    load = serving_hour.Load(server.url, alone)
    asyncio.run(load.run(0.5, 3))
    assert (load.errors, load.changed) == ([], [])
    assert load.counts["answers compared"] == load.counts["known"] + load.counts["new"]
    assert sum(load.counts[name] for name in ("known", "new", "leave", "bad")) >= 3


@compiled
def test_an_answer_that_is_not_right_is_told(server, alone, monkeypatch):
    number = next(at for at, one in enumerate(alone) if "token_logprobs" in (one[0][0][1] or ()))
    load = serving_hour.Load(server.url, copy.deepcopy(alone))
    monkeypatch.setattr(load.draw, "randrange", lambda stop: number)
    monkeypatch.setattr(load.draw, "choices", lambda kinds, weights: kinds[:1])
    asyncio.run(load.run(0.0, 1))
    assert load.changed == []
    logprobs = load.alone[number][0][0][1]["token_logprobs"]
    logprobs[-1] = float(np.nextafter(logprobs[-1], 0.0))
    asyncio.run(load.run(0.0, 1))
    assert (load.changed, load.errors) == ([number], [])


@compiled
def test_another_status_is_an_error(server, alone, monkeypatch):
    monkeypatch.setattr(serving_hour, "good", lambda number: ("/v1/completions", {"prompt": ""}))
    load = serving_hour.Load(server.url, alone)
    monkeypatch.setattr(load.draw, "choices", lambda kinds, weights: kinds[:1])
    asyncio.run(load.run(0.0, 1))
    assert load.counts["known"] == len(load.errors) == 1
    assert "ValueError: status 400 for" in load.errors[0]


@compiled
@pytest.mark.parametrize("at", range(len(BAD)))
def test_bad_requests_have_their_status(server, at):
    path, body, status = BAD[at]
    assert server.http.post(path, content=body).status_code == status


def test_requests_are_those_of_their_numbers():
    assert good(5) == good(5) != good(6)
    kinds = [good(number) for number in range(200)]
    assert {path for path, _ in kinds} == {"/v1/completions", "/v1/chat/completions"}
    assert {type(body.get("prompt")) for _, body in kinds} == {str, list, type(None)}


def test_growth_is_the_slope_of_the_stretches():
    at = np.arange(200.0) * 36  # two hours
    noise = np.random.default_rng(0).normal(size=200)
    values = 500 + 3 * at / 3600 + noise
    values[:40] -= 100  # the first fifth is left out
    found = serving_hour.growth([*zip(at, values, strict=True)])
    x, y = (part[40:].reshape(20, 8).mean(1) for part in (at / 3600, values))
    (slope, _), covariance = np.polyfit(x, y, 1, cov="unscaled")
    left = y - np.polyval(np.polyfit(x, y, 1), x)
    half = 2.101 * (covariance[0, 0] * (left @ left) / 18) ** 0.5
    assert found == pytest.approx({"per_hour": slope, "low": slope - half, "high": slope + half})
    assert found["low"] < 3 < found["high"]


def test_growth_of_what_stays():
    flat = serving_hour.growth([(float(at), 7.0) for at in range(100)])
    assert flat == {"per_hour": 0.0, "low": 0.0, "high": 0.0}
    assert serving_hour.growth([(float(at), 7.0) for at in range(20)]) is None
