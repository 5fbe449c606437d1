"""Requests that cannot be answered: OpenAI's error form, the right status, and the server lives."""

import json
import re
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(autouse=True)
def lives(server):
    """After each of these requests the next one is answered."""
    yield
    assert server.http.get("/health").status_code == 200
    assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the body is no JSON"),
        (b"{", "the body is no JSON"),
        (b'{"prompt": "a"} x', "the body is no JSON"),
        (b'{"prompt": NaN}', "NaN is no number in JSON"),
        (b'{"temperature": 1e999, "prompt": "a"}', "temperature: Input should be a finite number"),
        (b'{"seed": 1' + b"0" * 5000 + b', "prompt": "a"}', "the body is no JSON"),
        (b"[" * 50_000, "nested too deeply|no JSON"),
        (b'{"prompt": "\xff"}', r"the body is not UTF-8 \(byte 12\)"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'["prompt"]', "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
def test_bodies_that_are_no_request(server, body, words):
    status, message, _ = server.refused(COMPLETIONS, body)
    assert status == 400
    assert re.search(words, message)


@pytest.mark.parametrize(
    ("path", "body", "words", "param"),
    [
        (COMPLETIONS, {}, "prompt: Field required", "prompt"),
        (
            COMPLETIONS,
            {"prompt": "a", "max_token": 1},
            'unknown field "max_token"; did you mean "max_tokens"?',
            "max_token",
        ),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "1"}, "max_tokens: Input should be a valid integer", "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "greater than or equal to 0", "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "gives nothing without echo", "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, "greater than or equal to 0", "temperature"),
        (COMPLETIONS, {"prompt": "a", "top_p": 0}, "greater than 0", "top_p"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "greater than or equal to 1", "n"),
        (COMPLETIONS, {"prompt": ["a"] * 65, "n": 2}, "130 choices in one request; at most 128", "n"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "less than or equal to 20", "logprobs"),
        (COMPLETIONS, {"prompt": "a", "stop": [""]}, "none of them empty", "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 17}, "at most 16 stop strings", "stop"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"8192": 1}}, "no such token", "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "by their numbers", "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "is for streams", "stream_options"),
        (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of is not supported", "best_of"),
        (COMPLETIONS, {"prompt": ""}, "the prompt is empty", "prompt"),
        (COMPLETIONS, {"prompt": []}, "the prompt is empty", "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "the prompt is empty", "prompt"),
        (COMPLETIONS, {"prompt": [[1, 8192]]}, "numbers from 0 to 8191", "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "greater than or equal to 0", "prompt.0"),
        (COMPLETIONS, {"prompt": [1] * 250, "max_tokens": 7}, "250 tokens of prompt and 7 new ones", "max_tokens"),
        (COMPLETIONS, {"prompt": [1] * 256}, "do not fit the context of 256", "prompt"),
        (CHAT, {"messages": []}, "messages: List should have at least 1 item", "messages"),
        (CHAT, {"messages": [{"role": "odd", "content": "a"}]}, "messages.0.role: Input should be", "messages.0.role"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "refuse"}]},
            "refuses these messages: no such role",
            "messages",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 1}, "needs logprobs", "top_logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}, "at least 1", "max_tokens"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "type: Input should be 'text'",
            "messages.0.content.0.type",
        ),
        ("/tokenize", {}, "either a prompt or messages", "prompt"),
        ("/detokenize", {"tokens": [9000]}, "numbers from 0 to 8191", "tokens"),
    ],
)
def test_fields_that_cannot_be_met(server, path, body, words, param):
    status, message, about = server.refused(path, body)
    assert status == 400
    assert words in message
    assert about == param


def test_a_default_that_does_not_fit_is_cut(server):
    answer = server.post(COMPLETIONS, {"prompt": [1] * 253, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 3


def test_huge_bodies(server):
    status, message, _ = server.refused(COMPLETIONS, {"prompt": "a" * 100_000})
    assert (status, message) == (413, "the body has more than 100000 bytes")

    def parts():
        for _ in range(200):
            yield b" " * 1000

    answer = server.http.post(COMPLETIONS, content=parts())  # its length is not told beforehand
    assert answer.status_code == 413


def test_routes(server):
    assert server.refused("/v1/embeddings", {})[:2] == (404, "there is no such route")
    wrong = server.http.get(COMPLETIONS)
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (405, "GET is not for this route")
    assert server.http.get("/v1/models/../../etc/passwd").status_code == 404
    assert server.http.get("/version").json()["version"]


@pytest.mark.parametrize("name", ["", "zoo:llama", "../llama", "/", "x" * 500, "llama\n"])
def test_a_model_s_name_is_no_path(server, name):
    status, message, param = server.refused(COMPLETIONS, {"model": name, "prompt": "a"})
    assert (status, message, param) == (404, "no such model is served; there is: llama", "model")


def test_what_is_no_http(server):
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as raw:
        raw.sendall(b"\x00\xff nonsense\r\n\r\n")
        assert b"400" in raw.recv(1000)


def test_tokens_of_text_and_back(server):
    found = server.post("/tokenize", {"prompt": "Hello wörld", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 256
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "Hello wörld"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "a"}]}).json()
    assert server.post("/detokenize", {"tokens": chat["tokens"]}).json() == {"prompt": "user: a\nassistant:"}


def test_random_bodies_never_break_it(server):
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )
    names = st.sampled_from(["prompt", "n", "stop", "logprobs", "seed", "logit_bias", "echo", "temperature", "top_k"])

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.dictionaries(names, values, max_size=4), st.sampled_from([COMPLETIONS, CHAT, "/tokenize", "/detokenize"]))
    def every_body(body, path):
        answer = server.post(path, json.dumps({**body, "max_tokens": 1}).encode("utf-8", "surrogatepass"))
        assert answer.status_code in (200, 400)
        assert ("error" in answer.json()) == (answer.status_code == 400)

    every_body()
