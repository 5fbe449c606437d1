"""What a request's fields ask for, as orders: one for each choice."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sparity.errors import InvalidInput
from sparity.serve.http.errors import Refused
from sparity.serve.http.fields import Answering, ChatFields, CompletionFields
from sparity.serve.sampling import Sampling
from sparity.serve.sequence import Order
from sparity.serve.served_model import ServedModel

STEP = 0x9E3779B97F4A7C15  # between the seeds of two choices
MOST_STOPS = 16
DEFAULT_TOKENS = 16  # of a completion that names none


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens."""

    text: str
    ids: tuple[int, ...]


def completion_prompts(fields: CompletionFields, served: ServedModel) -> list[Prompt]:
    """The prompts of a completion: one or several, as text or as tokens.

    Raises:
        Refused: there is none, or a token that the model does not know.
    """
    given = fields.prompt
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    prompts: Sequence[object] = given if isinstance(given, list) and several else [given]
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            found.append(Prompt(prompt, tuple(served.encode(prompt))))
        elif isinstance(prompt, list):
            found.append(Prompt("", tuple(prompt)))
            known = served.execution.vocabulary
            if any(token >= known for token in prompt):
                raise Refused(400, f"tokens of {served.name} are numbers from 0 to {known - 1}", "prompt")
            if fields.echo:
                text = served.tokenizer.decode(prompt, skip_special_tokens=True)
                found[-1] = Prompt(text, found[-1].ids)
    if not all(prompt.ids for prompt in found):
        raise Refused(400, "the prompt is empty: give at least one token to go on from", "prompt")
    return found


def chat_prompt(fields: ChatFields, served: ServedModel) -> Prompt:
    """The prompt that a conversation is to the model.

    Raises:
        Refused: the model cannot chat, or its template takes no such messages.
    """
    try:
        ids = served.conversation([message.plain for message in fields.messages])
    except InvalidInput as error:
        raise Refused(400, str(error), "messages") from error
    if not ids:
        raise Refused(400, "the messages come to no token", "messages")
    return Prompt("", tuple(ids))


def orders_of(
    fields: CompletionFields | ChatFields, prompts: Sequence[Prompt], served: ServedModel, seconds: float, choices: int
) -> list[Order]:
    """The orders of all choices, prompt by prompt.

    Args:
        fields: of the request.
        prompts: of it.
        served: the model.
        seconds: in which they must be done.
        choices: the most that a request may ask for.

    Raises:
        Refused: they ask for too much, or for what cannot be.
    """
    n = fields.n or 1
    if n * len(prompts) > choices:
        raise Refused(400, f"{n * len(prompts)} choices in one request; at most {choices}", "n")
    if fields.stream_options is not None and not fields.stream:
        raise Refused(400, "stream_options is for streams: set stream to true", "stream_options")
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    if len(stop) > MOST_STOPS or not all(stop):
        raise Refused(400, f"at most {MOST_STOPS} stop strings, none of them empty", "stop")
    shown, of_prompt = _logprobs(fields)
    seed = secrets.randbits(63) if fields.seed is None else fields.seed
    deadline, found = time.monotonic() + seconds, []
    for index, prompt in enumerate(prompts):
        most = _most(fields, prompt, served)
        for choice in range(n):
            found.append(
                Order(
                    prompt=prompt.ids,
                    sampling=_sampling(fields, served, (seed + STEP * (index * n + choice)) % 2**64),
                    most=most,
                    least=min(fields.min_tokens or 0, most),
                    stop=stop,
                    stop_kept=bool(fields.include_stop_str_in_output),
                    stop_ids=frozenset(fields.stop_token_ids or ()),
                    ignore_end=bool(fields.ignore_eos),
                    logprobs=shown,
                    prompt_logprobs=of_prompt,
                    scored=of_prompt is not None and most <= 1,
                    deadline=deadline,
                )
            )
    return found


def _logprobs(fields: CompletionFields | ChatFields) -> tuple[int | None, int | None]:
    """How many likeliest tokens are told, of the answer and of the prompt."""
    if isinstance(fields, CompletionFields):
        return fields.logprobs, fields.logprobs if fields.echo else None
    if fields.top_logprobs is not None and not fields.logprobs:
        raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
    return (fields.top_logprobs or 0) if fields.logprobs else None, None


def _most(fields: CompletionFields | ChatFields, prompt: Prompt, served: ServedModel) -> int:
    """Tokens of the answer at most."""
    context, given = served.execution.context, fields.max_tokens
    room = context - len(prompt.ids)
    name = "max_tokens"
    if isinstance(fields, ChatFields):
        if fields.max_completion_tokens is not None:
            given, name = fields.max_completion_tokens, "max_completion_tokens"
        if given == 0:
            raise Refused(400, f"{name} must be at least 1", name)
        default = max(room, 1)
    else:
        default = min(DEFAULT_TOKENS, max(room, 1))
        if given == 0 and not fields.echo:
            raise Refused(400, "max_tokens 0 gives nothing without echo", name)
    most = default if given is None else given
    if most > room:
        raise Refused(
            400,
            f"{len(prompt.ids)} tokens of prompt and {most} new ones do not fit the context of {context} tokens",
            name
            if given is not None and room > 0
            else "prompt"
            if isinstance(fields, CompletionFields)
            else "messages",
            "context_length_exceeded",
        )
    return most


def _sampling(fields: Answering, served: ServedModel, seed: int) -> Sampling:
    bias = []
    for token, value in (fields.logit_bias or {}).items():
        if not (token.isdecimal() and len(token) < 10 and int(token) < served.execution.vocabulary):
            raise Refused(
                400, "logit_bias takes tokens by their numbers, and this model has no such token", "logit_bias"
            )
        bias.append((int(token), float(value)))

    def or_default(value: float | None, default: float) -> float:
        return default if value is None else float(value)

    return Sampling(
        temperature=or_default(fields.temperature, 1.0),
        top_p=or_default(fields.top_p, 1.0),
        top_k=max(fields.top_k or 0, 0),
        min_p=or_default(fields.min_p, 0.0),
        repetition_penalty=or_default(fields.repetition_penalty, 1.0),
        presence_penalty=or_default(fields.presence_penalty, 0.0),
        frequency_penalty=or_default(fields.frequency_penalty, 0.0),
        logit_bias=tuple(bias),
        seed=seed,
    )
