"""`sparity generate MODEL PROMPT`: text from a model, as it is produced."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from sparity.cli import console
from sparity.cli.options import Json, Threads
from sparity.cli.output import write

COLDEST = 0.001  # temperatures below overflow what they divide


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder or name, plain or packed, a GGUF file, or zoo:llama.", show_default=False
        ),
    ],
    prompt: Annotated[str, typer.Argument(help='The text to go on from; "-" reads it from standard input.')],
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="0 takes the likeliest token, more draws; at least 0.001.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draw.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Let a model that skips activations draft, and print its dense greedy tokens.",
        ),
    ] = False,
    memory: Annotated[
        str | None, typer.Option(help='Of the weights of an offloaded model (sparity offload), such as "1.5GB".')
    ] = None,
    draft: Annotated[int, typer.Option(min=1, max=31, help="Tokens drafted before each check, with --exact.")] = 4,
    threads: Threads = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print the speed, and why calls left the fast path, on standard error.")
    ] = False,
    json: Json = False,
) -> None:
    """Generate text from a prompt; it is printed as it comes, and without the prompt.

    A model in bfloat16 runs on Sparity's engine, packed or plain; another one on PyTorch.
    """
    with console.errors_in_one_line():
        import torch

        from sparity.cli.text_stream import TextStream
        from sparity.dynamic.speculate.exact import ExactAnswer, generate_exact
        from sparity.engine.attach import attach
        from sparity.engine.decoding.model import fallbacks
        from sparity.errors import InvalidInput
        from sparity.measure.timing.generation import STREAMED
        from sparity.models.loading import load, load_tokenizer

        if exact and temperature:
            raise InvalidInput("--exact gives the likeliest tokens: leave --temperature out")
        if 0 < temperature < COLDEST:
            raise InvalidInput(f"--temperature {temperature:g}: at least {COLDEST}, or 0 for the likeliest token")
        prompt = _prompt(prompt)
        if threads is not None:
            torch.set_num_threads(threads)
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise InvalidInput(f"{model} has no tokenizer: generate needs the folder with its tokenizer.json")
        ids = _ids(model, tokenizer, prompt, chat)
        subject = load(model) if memory is None else _offloaded(model, memory)
        if subject.dtype == torch.bfloat16 and memory is None:
            attach(subject)
        _check_length(subject.config, len(ids), tokens)
        torch.manual_seed(seed)
        stream = TextStream(tokenizer, (lambda piece: None) if json else write)
        answer: ExactAnswer | None = None
        with torch.no_grad(), _as_the_model_asks(model):
            if exact:
                answer = generate_exact(
                    subject, torch.tensor([ids]), max_new_tokens=tokens, draft=draft, streamer=stream
                )
            else:
                subject.generate(
                    input_ids=torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                    streamer=stream,
                    max_new_tokens=tokens,
                    **STREAMED,
                    **_sampling(temperature, top_p),
                )
    speed = _speed(len(ids), stream) | _drafts(answer)
    if json:
        console.print_json({"model": model, "prompt": prompt, "text": stream.text, "ids": stream.ids, **speed})
        return
    write("\n")
    if stats:
        rate = speed["tokens_per_second"]
        after = "" if rate is None else f", then {rate:.1f} tokens/s"
        console.err.print(
            f"{speed['prompt_tokens']} tokens of prompt, {speed['tokens']} new ones; "
            f"first token after {speed['first_token']:.2f} s{after}",
            soft_wrap=True,
        )
        if answer is not None:
            console.err.print(
                f"{answer.drafted} tokens drafted, {answer.accepted} of them right ({100 * answer.acceptance:.1f} %), "
                f"{answer.checks} dense checks",
                soft_wrap=True,
            )
        if memory is not None:
            console.err.print(subject.sparity_offload.counts.words, soft_wrap=True)
        for reason, calls in fallbacks(subject).most_common():
            console.err.print(f"left the fast path {calls} x: {reason}", soft_wrap=True)


def _offloaded(model: str, memory: str) -> Any:
    """A model whose units are on disk; what a token must wait for is said before it begins."""
    from sparity.dynamic.offload.loading import load_offloaded

    subject = load_offloaded(model, memory)
    console.err.print(subject.sparity_offload.bound.words, soft_wrap=True)
    return subject


def _prompt(given: str) -> str:
    """The prompt, from standard input when it is "-"."""
    from sparity.errors import InvalidInput

    if given == "-" and sys.stdin is None:
        raise InvalidInput("the prompt is to come from standard input, which is closed")
    try:
        text = sys.stdin.read() if given == "-" else given
        text.encode()  # bytes that are no text came in as lone surrogates
    except UnicodeError as error:
        raise InvalidInput("the prompt is not text in UTF-8: give text, or convert it first") from error
    return text


def _ids(model: str, tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """The prompt's ids, with the tokenizer's special tokens or the chat template's."""
    from sparity.errors import InvalidInput

    if not chat:
        ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    elif tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        raise InvalidInput(f"{model} has no chat template: leave --chat out, or use a model that was trained to chat")
    if not ids:
        raise InvalidInput("the prompt is empty: give at least one token to go on from")
    return ids


def _check_length(config: Any, prompt: int, tokens: int) -> None:
    from sparity.errors import InvalidInput
    from sparity.models import transformers as hf

    context = hf.context_length(config)
    if context and prompt + tokens > context:
        raise InvalidInput(
            f"the prompt of {prompt} tokens and {tokens} new ones do not fit the model's context of {context}: shorten "
            "the prompt or lower --tokens"
        )


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """What decides each token; a temperature, top-p or top-k of the model's own file does not."""
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


@contextmanager
def _as_the_model_asks(model: str) -> Iterator[None]:
    """What transformers says when the model's own generation_config.json asks for something that cannot be."""
    from sparity.errors import InvalidInput, SparityError
    from sparity.models import transformers as hf

    try:
        yield
    except (SparityError, OSError):
        raise
    except Exception as error:  # the file may ask for anything that transformers can do, with any number
        raise InvalidInput(
            f"transformers cannot generate as {model} asks in its generation_config.json: {hf.first_words(error)}; "
            "change or remove that file"
        ) from error


def _speed(prompt: int, stream: Any) -> dict[str, Any]:
    """Numbers of tokens, seconds to the first one, and tokens per second after it, if there were more."""
    times = stream.times
    return {
        "prompt_tokens": prompt,
        "tokens": len(stream.ids),
        "first_token": times[0] - stream.begun,
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
    }


def _drafts(answer: Any) -> dict[str, Any]:
    """What the drafts of exact mode came to; nothing of another mode."""
    if answer is None:
        return {}
    named = {name: getattr(answer, name) for name in ("drafted", "accepted", "checks", "acceptance")}
    return {"exact": named}
