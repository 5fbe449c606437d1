"""The server, driven by OpenAI's own client."""

import openai
import pytest
import torch
from transformers.cache_utils import DynamicCache

import sparity
from sparity.models.loading import load_tokenizer

TEXT = "The following example"
GREEDY = {"model": "llama", "temperature": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("zoo:llama")


def complete(server, prompt=TEXT, **options):
    return server.client.completions.create(prompt=prompt, **{**GREEDY, "max_tokens": 12, **options})


def chat(server, content="Tell me more", **options):
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": content}]
    return server.client.chat.completions.create(messages=messages, **{**GREEDY, "max_tokens": 12, **options})


def test_a_completion_is_what_generate_gives(server, tokenizer):
    model = sparity.attach(sparity.load("zoo:llama", dtype="bfloat16"))
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :])
    answer = complete(server)
    assert answer.choices[0].text == expected
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", "llama", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (ids.shape[1], 12)
    assert answer.usage.total_tokens == ids.shape[1] + 12
    assert complete(server, ids[0].tolist()).choices[0].text == expected
    assert complete(server, extra_body={"model": None}).choices[0].text == expected


def test_a_stream_is_the_same_answer_in_pieces(server):
    events = list(complete(server, stream=True, stream_options={"include_usage": True}, logprobs=1))
    answer = complete(server, logprobs=1)
    pieces = [event.choices[0] for event in events[:-1]]
    assert "".join(piece.text for piece in pieces) == answer.choices[0].text
    assert len(pieces) > 6
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [one for piece in pieces for one in getattr(piece.logprobs, name)]
        assert parts == getattr(answer.choices[0].logprobs, name)
    assert events[-1].choices == []
    assert events[-1].usage.completion_tokens == 12
    assert {event.usage for event in events[:-1]} == {None}
    assert len({event.id for event in events}) == 1


def test_the_stream_as_it_goes_over_the_wire(server):
    body = {**GREEDY, "prompt": TEXT, "max_tokens": 3, "stream": True}
    body["stream_options"] = {"continuous_usage_stats": True}
    answer = server.post("/v1/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])
    assert '"completion_tokens": 3' in lines[-3]


def test_stop_strings_across_tokens(server):
    full = complete(server, max_tokens=24).choices[0].text
    stop = full[9:14]
    answer = complete(server, max_tokens=24, stop=["never in it", stop])
    assert answer.choices[0].text == full[: full.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    streamed = list(complete(server, max_tokens=24, stop=stop, stream=True))
    assert "".join(event.choices[0].text for event in streamed) == answer.choices[0].text
    kept = complete(server, max_tokens=24, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == full[: full.index(stop)] + stop


def test_seeds(server):
    sampled = {"temperature": 1.5, "max_tokens": 8}
    first, again, other = (complete(server, seed=seed, **sampled).choices[0].text for seed in (1, 1, 2))
    assert first == again != other
    assert len({complete(server, **sampled).choices[0].text for _ in range(4)}) > 1


def test_several_choices_of_several_prompts(server, tokenizer):
    prompts = [TEXT, "def f(x):"]
    answer = complete(server, prompts, n=2, temperature=1.2, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    alone = complete(server, n=2, temperature=1.2, seed=5)
    assert [choice.text for choice in alone.choices] == [choice.text for choice in answer.choices[:2]]
    assert alone.usage.prompt_tokens + len(tokenizer(prompts[1])["input_ids"]) == answer.usage.prompt_tokens
    streamed = dict.fromkeys(range(4), "")
    for event in complete(server, prompts, n=2, temperature=1.2, seed=5, stream=True):
        streamed[event.choices[0].index] += event.choices[0].text
    assert list(streamed.values()) == [choice.text for choice in answer.choices]


def test_logprobs_of_an_echoed_prompt_are_the_model_s(server, tokenizer):
    ids = tokenizer("The following example shows")["input_ids"]
    answer = complete(server, [ids], echo=True, logprobs=2, max_tokens=1)
    model = sparity.attach(sparity.load("zoo:llama", dtype="bfloat16"))
    with torch.no_grad():
        shares = (
            model(torch.tensor([ids]), past_key_values=DynamicCache(config=model.config))
            .logits[0]
            .float()
            .log_softmax(-1)
        )
    expected = [float(shares[at, token]) for at, token in enumerate(ids[1:])]
    told = answer.choices[0].logprobs
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-5)
    assert len(told.tokens) == len(ids) + 1
    assert answer.choices[0].text.startswith(tokenizer.decode(ids))
    assert "".join(told.tokens) == answer.choices[0].text
    assert [answer.choices[0].text[at:][:3] for at in told.text_offset] == [
        answer.choices[0].text[sum(map(len, told.tokens[:at])) :][:3] for at in range(len(told.tokens))
    ]
    likeliest = [max(top.values()) for top in told.top_logprobs[1:-1]]
    assert likeliest == pytest.approx(shares[:-1].max(-1).values.tolist(), abs=1e-5)
    only = complete(server, [ids], echo=True, logprobs=0, max_tokens=0)
    assert only.choices[0].logprobs.token_logprobs == told.token_logprobs[:-1]
    assert only.choices[0].text == tokenizer.decode(ids)


def test_a_conversation(server):
    answer = chat(server, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert (answer.object, choice.message.role, choice.finish_reason) == ("chat.completion", "assistant", "length")
    assert answer.usage.completion_tokens == len(choice.logprobs.content) == 12
    assert b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode() == choice.message.content
    assert all(token.top_logprobs[0].logprob == token.logprob for token in choice.logprobs.content)
    events = list(chat(server, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == choice.message.content
    parts = [{"type": "text", "text": "Tell "}, {"type": "text", "text": "me more"}]
    assert chat(server, parts).choices[0].message.content == choice.message.content
    prompt = "system: Be brief\nuser: Tell me more\nassistant:"
    assert complete(server, prompt).choices[0].text == choice.message.content
    longest = server.client.chat.completions.create(
        model="llama", messages=[{"role": "user", "content": "a"}], max_completion_tokens=2
    )
    assert longest.usage.completion_tokens == 2


def test_a_known_beginning_is_told_in_the_usage(server):
    prompt = "one two three four five six " * 20
    first, second = complete(server, prompt), complete(server, prompt)
    assert first.choices == second.choices
    assert second.usage.prompt_tokens_details.cached_tokens >= 64


def test_models(server):
    assert [model.id for model in server.client.models.list()] == ["llama"]
    assert server.client.models.retrieve("llama").model_dump()["max_model_len"] == 256
    with pytest.raises(openai.NotFoundError, match="no such model is served; there is: llama"):
        server.client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no such model"):
        complete(server, model="zoo:relu")


def test_what_is_not_supported_is_refused_by_name(server):
    with pytest.raises(openai.BadRequestError, match="response_format is not supported: answers are text") as refused:
        chat(server, response_format={"type": "json_object"})
    assert refused.value.param == "response_format"
    assert chat(server, response_format={"type": "text"}, tools=[]).choices
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        chat(server, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        complete(server, suffix="x")


def test_other_fields_of_vllm(server):
    assert complete(server, extra_body={"top_k": 1}, temperature=2).choices[0].text == complete(server).choices[0].text
    named = complete(server, logprobs=0, extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs.tokens
    ids = [int(name.removeprefix("token_id:")) for name in named]
    assert server.post("/detokenize", {"tokens": ids}).json()["prompt"] == complete(server).choices[0].text
    third = complete(server, extra_body={"stop_token_ids": [ids[2]]})
    assert (third.usage.completion_tokens, third.choices[0].finish_reason) == (3, "stop")
    biased = complete(server, logit_bias={str(ids[0]): -100}, max_tokens=1, logprobs=0)
    assert biased.choices[0].logprobs.tokens != [complete(server, max_tokens=1, logprobs=0).choices[0].logprobs.tokens]
