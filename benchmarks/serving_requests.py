"""Requests to a server, good ones by their numbers and bad ones, and answers in one form, streamed or whole."""

import json
import random

WORDS = [
    "Once",
    "the",
    "river",
    "and",
    "größe",
    "猫",
    "🙂",
    "who",
    "said",
    "\n",
    "def f(x):",
    "ran",
    "42",
    "never",
    "é",
]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BAD = [  # path, body, and the status that it must be refused with
    (COMPLETIONS, b"", 400),
    (COMPLETIONS, b'{"prompt": "a"', 400),
    (COMPLETIONS, b'{"prompt": "\xff"}', 400),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400),
    (COMPLETIONS, b"[" * 5000, 400),
    (COMPLETIONS, b'{"prompt": "a", "max_token": 1}', 400),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400),
    (COMPLETIONS, b'{"prompt": "a", "n": 0}', 400),
    (COMPLETIONS, b'{"prompt": [-1]}', 400),
    (COMPLETIONS, b'{"prompt": [1, 2], "max_tokens": 100000}', 400),
    (COMPLETIONS, b'{"prompt": "' + b"long " * 10_000 + b'"}', 400),
    (COMPLETIONS, b" " * 1_100_000, 413),
    (COMPLETIONS, b'{"model": "../model", "prompt": "a"}', 404),
    (CHAT, b'{"messages": []}', 400),
    (CHAT, b'{"messages": [{"role": "odd", "content": "a"}]}', 400),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}', 400),
    ("/tokenize", b"{}", 400),
    ("/detokenize", b'{"tokens": [4000000]}', 400),
    ("/v1/embeddings", b"{}", 404),
    ("/health", b"{}", 405),
]
RAW = [  # bytes of connections that are closed behind them
    b"",
    b"\x00\xff nonsense\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b'POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 33\r\n\r\n{"prompt": "a", "max_tokens": 99}',
]


def good(number):
    """The path and the body of the request of a number."""
    draw = random.Random(number)
    begins = random.Random(draw.randrange(8))  # as one in eight others do, where the first words are the same
    words = [(begins if at < 40 else draw).choice(WORDS) for at in range(draw.randint(1, 60))]
    body = {
        "max_tokens": draw.randint(1, 24),
        "temperature": draw.choice([0.0, 0.7, 1.0]),
        "top_p": draw.choice([1.0, 0.9]),
        "frequency_penalty": draw.choice([0.0, 0.5]),
        "seed": draw.randrange(2**31),
        "stop": draw.choice([None, None, ["ing", "."]]),
        "ignore_eos": draw.random() < 0.5,
        "n": draw.choice([1, 1, 1, 2]),
    }
    kind = draw.choice(["text", "text", "tokens", "scored", "chat"])
    if kind == "chat":
        said = [{"role": "user", "content": " ".join(words)}]
        return CHAT, {**body, "messages": said, **draw.choice([{}, {"logprobs": True, "top_logprobs": 2}])}
    body["logprobs"] = draw.choice([None, 0, 3])
    if kind == "scored":
        body = {**body, "echo": True, "max_tokens": draw.randint(0, 1), "logprobs": 1}
    ids = [draw.randrange(10, 8000) for _ in words]
    return COMPLETIONS, {**body, "prompt": ids if kind == "tokens" else " ".join(words)}


def whole(answer):
    """What an answer says: of each choice its text, logprobs and end, and how many tokens there were."""
    choices = {
        one["index"]: [
            one["text"] if "text" in one else one["message"]["content"],
            one["logprobs"],
            one["finish_reason"],
        ]
        for one in answer["choices"]
    }
    return choices, tokens(answer["usage"])


def joined(events):
    """The same of a stream's events.

    Raises:
        ValueError: one of them tells of a fault.
    """
    choices = {}
    for event in events:
        if "error" in event:
            raise ValueError(f"an error within a stream: {event['error']}")
        for one in event["choices"]:
            have = choices.setdefault(one["index"], ["", None, None])
            have[0] += one["text"] if "text" in one else one["delta"].get("content", "")
            for name, values in (one["logprobs"] or {}).items():
                have[1] = have[1] or {}
                have[1].setdefault(name, []).extend(values)
            have[2] = one["finish_reason"] or have[2]
    return choices, tokens(events[-1]["usage"])


def tokens(usage):
    """Tokens of the prompt and of the answer; how many were known before is no part of it."""
    return usage["prompt_tokens"], usage["completion_tokens"]


def events_of(lines):
    """The events of a stream's lines.

    Raises:
        ValueError: it ends before its time.
    """
    said = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    if not said or said[-1] != "[DONE]":
        raise ValueError("a stream without its end")
    return [json.loads(each) for each in said[:-1]]
