"""Queues that are full, time that is over, clients that leave, keys, numbers, and how a server ends."""

import json
import re
import threading
import time

import httpx
import openai
import pytest

from served_http import serving
from sparity.errors import InvalidInput
from sparity.serve.http import replies
from sparity.serve.http.server import bind
from sparity.serve.service import Service

LONG = {"prompt": "Tell me", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def held(opened, monkeypatch):
    """A model whose steps wait until they are let through."""
    gate, run = threading.Semaphore(0), opened.execution.run

    def wait(parts):
        assert gate.acquire(timeout=20)
        return run(parts)

    monkeypatch.setattr(opened.execution, "run", wait)
    opened.steps = lambda times=10_000: gate.release(times)
    yield opened
    gate.release(10_000)


@pytest.fixture
def opened(llama):
    """A model without requests."""
    llama.scheduler.running.clear()
    llama.scheduler.waiting.clear()
    return llama


def in_threads(calls):
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def test_a_full_queue_refuses_and_lets_in_again(held):
    with serving([held], waiting=1) as served:
        statuses = []
        ask = lambda: statuses.append(served.post("/v1/completions", {**LONG, "max_tokens": 1}).status_code)  # noqa: E731
        threads = in_threads([ask] * 5)  # as many as there are slots, and one that waits
        served.wait(lambda: served.service.worker.held == 5)
        refused = served.post("/v1/completions", LONG)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"] == {
            "message": "too many requests are waiting: try again later",
            "type": "RateLimitError",
            "param": None,
            "code": "queue_full",
        }
        assert served.refused("/v1/completions", {**LONG, "n": 6})[0] == 429
        held.steps()
        for thread in threads:
            thread.join(20)
        assert statuses == [200] * 5
        assert served.post("/v1/completions", {**LONG, "max_tokens": 1}).status_code == 200


def test_time_that_is_over(held):
    with serving([held], seconds=0.3) as served:
        late = []
        threads = in_threads([lambda: late.append(served.refused("/v1/completions", LONG))])
        served.wait(lambda: held.scheduler.running)
        time.sleep(0.4)
        held.steps(1)
        threads[0].join(20)
        assert late == [(504, "the time for this request is over", None)]
        assert held.scheduler.running == {}


def test_an_error_within_a_stream(held):
    with (
        serving([held], seconds=0.5) as served,
        served.client.completions.create(model="llama", prompt="Tell me", max_tokens=200, stream=True) as stream,
    ):
        held.steps(2)
        first = next(stream)
        assert first.choices[0].finish_reason is None
        time.sleep(0.6)
        held.steps(1)
        with pytest.raises(openai.APIError, match="the time for this request is over"):
            list(stream)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(held, stream):
    with serving([held]) as served:
        if stream:
            with served.http.stream("POST", "/v1/completions", json={**LONG, "stream": True, "n": 2}) as answer:
                held.steps(1)
                next(answer.iter_lines())
                assert len(held.scheduler.running) == 2
        else:
            with pytest.raises(httpx.ReadTimeout):
                served.http.post("/v1/completions", json={**LONG, "n": 2}, timeout=0.3)
        let_through = 0

        def freed():
            nonlocal let_through
            let_through += 1
            held.steps(1)
            return not held.scheduler.running

        served.wait(freed)
        assert let_through < LONG["max_tokens"]  # so the answer did not simply come to its end
        held.steps()
        assert served.post("/v1/completions", {**LONG, "max_tokens": 2}).json()["usage"]["completion_tokens"] == 2


def test_a_stream_shows_that_it_lives_while_no_token_comes(held, monkeypatch):
    monkeypatch.setattr(replies, "QUIET", 0.05)
    body = {**LONG, "max_tokens": 2, "stream": True}
    with serving([held]) as served, served.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": still at work"
        held.steps()
        rest = [line for line in lines if line and not line.startswith(":")]
    assert len(rest) == 3
    assert rest[-1] == "data: [DONE]"


def test_requests_that_run_are_answered_before_the_server_ends(held):
    answers = []
    with serving([held]) as served:
        threads = in_threads([lambda: answers.append(served.post("/v1/completions", {**LONG, "max_tokens": 9}))])
        served.wait(lambda: held.scheduler.running)
        threading.Timer(0.3, held.steps).start()  # by then the server was told to stop
    threads[0].join(20)
    assert [answer.status_code for answer in answers] == [200]
    assert answers[0].json()["usage"]["completion_tokens"] == 9


def test_a_key(opened):
    with serving([opened], key="a secret") as served:
        stranger = httpx.Client(base_url=served.url, timeout=10)
        for path in ("/v1/models", "/metrics", "/v1/models/llama"):
            refused = stranger.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert "a secret" not in refused.text
        assert stranger.post("/v1/completions", json={"prompt": "a"}).status_code == 401
        assert stranger.get("/health").status_code == 200
        stranger.close()


def test_a_key_opens(opened):
    with serving([opened], key="secret") as served:
        assert [model.id for model in served.client.models.list()] == ["llama"]
        with pytest.raises(openai.AuthenticationError, match="asks for its API key"):
            served.client.with_options(api_key="other").models.list()


def numbers(text):
    """The metrics of a page, those of histograms by their sums and counts."""
    found = re.findall(
        r'^sparity:(\w+)\{engine="model",(?:finished_reason="(\w+)",)?model_name="llama"\} (\S+)$', text, re.M
    )
    return {name + (f".{reason}" if reason else ""): float(value) for name, reason, value in found}


def test_metrics(opened):
    with serving([opened]) as served:
        before = numbers(served.http.get("/metrics").text)
        assert before["request_success_total.stop"] == before["generation_tokens_total"] == 0
        for _ in range(2):
            served.post("/v1/completions", {"prompt": [5] * 70, "max_tokens": 3, "ignore_eos": True, "temperature": 0})
        served.wait(lambda: numbers(served.http.get("/metrics").text)["prompt_tokens_total"] == 140)
        found = numbers(served.http.get("/metrics").text)
    assert found["prompt_tokens_total"] == 140
    assert found["generation_tokens_total"] == 6
    assert found["request_success_total.length"] == 2
    assert (found["prefix_cache_queries_total"], found["prefix_cache_hits_total"]) == (140, 64)
    assert found["prompt_tokens_cached_total"] == 64
    assert found["num_requests_running"] == found["num_requests_waiting"] == found["kv_cache_usage_perc"] == 0
    assert found["time_to_first_token_seconds_count"] == found["e2e_request_latency_seconds_count"] == 2
    assert found["iteration_tokens_total_sum"] == 140 - 64 + 2 * 2
    assert 0 < found["request_decode_time_seconds_sum"] < found["request_inference_time_seconds_sum"]
    assert found["request_inference_time_seconds_sum"] < found["e2e_request_latency_seconds_sum"]


def test_two_models_share_no_name(llama):
    with pytest.raises(InvalidInput, match="two models have one name: llama, llama"):
        Service([llama, llama])


def test_an_address_that_is_taken():
    words = r"cannot listen at 127.0.0.1:.*choose another --port"
    with bind("127.0.0.1", 0) as first, pytest.raises(InvalidInput, match=words):
        bind(*first.getsockname())
    with pytest.raises(InvalidInput, match="cannot listen at no such host:1"):
        bind("no such host", 1)


def test_a_wire_that_carries_events_in_json(opened):
    with (
        serving([opened]) as served,
        served.http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 20, "stream": True}) as answer,
    ):
        lines = [line for line in answer.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines)
