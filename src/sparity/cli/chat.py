"""`sparity chat MODEL`: a conversation in the terminal, with another model side by side if asked."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparity.cli import console
from sparity.cli.generate import COLDEST
from sparity.cli.options import Threads
from sparity.cli.output import write

HELP = "/reset begins a new conversation, /quit ends it; an interrupt ends an answer."


def chat(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder or name, plain or packed, a GGUF file, or one of the zoo.", show_default=False
        ),
    ],
    beside: Annotated[
        str | None, typer.Option(help="Another model, which answers the same.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the models are told first.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="0 takes the likeliest token, more draws; at least 0.001.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draw.")] = 0,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a conversation; what the model takes.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A chat template (Jinja) in place of the tokenizer's own.", show_default=False)
    ] = None,
    threads: Threads = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print the speed of each answer on standard error.")] = False,
) -> None:
    """Talk to a model; with --beside to two, one answer after the other.

    What was said before is not read again, where the engine's step runs the model.
    """
    with console.errors_in_one_line():
        import torch

        from sparity.errors import InvalidInput
        from sparity.serve.conversation import Conversation
        from sparity.serve.sampling import Sampling
        from sparity.serve.served_model import open_model

        if 0 < temperature < COLDEST:
            raise InvalidInput(f"--temperature {temperature:g}: at least {COLDEST}, or 0 for the likeliest token")
        if threads is not None:
            torch.set_num_threads(threads)
        template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
        sampling = Sampling(temperature=temperature, top_p=max(top_p, 1e-9), seed=seed)
        conversations = []
        for path in [model] if beside is None else [model, beside]:
            served = open_model(path, slots=1, context=context, prefix_bytes=10**9, template=template)
            if not served.chats:
                raise InvalidInput(
                    f"{path} has no chat template: give --chat-template, or a model that was trained to chat"
                )
            conversations.append(Conversation(served, system, sampling, tokens))
        console.err.print(HELP)
        while (said := _line()) is not None:
            if said == "/quit":
                break
            if said == "/reset":
                for conversation in conversations:
                    conversation.reset()
            elif said:
                for conversation in conversations:
                    _answer(conversation, said, named=beside is not None, stats=stats)


def _line() -> str | None:
    """What is typed next; None where nothing comes any more."""
    from sparity.errors import InvalidInput

    if sys.stdin is None:
        raise InvalidInput("there is no standard input to read from")
    if sys.stdin.isatty():
        write("> ")
    try:
        line = sys.stdin.readline()
        line.encode()
    except KeyboardInterrupt:
        return None
    except UnicodeError as error:
        raise InvalidInput("what was typed is not text in UTF-8") from error
    return line.strip() if line else None


def _answer(conversation: Any, said: str, named: bool, stats: bool) -> None:
    from sparity.errors import InvalidInput

    if named:
        write(f"{conversation.served.name}: ")
    try:
        turn = conversation.say(said, write)
    except InvalidInput as error:  # the conversation may go on otherwise
        write("\n")
        console.err.print(f"error: {error}", style="red", soft_wrap=True)
        return
    write("\n")
    if stats:
        rate = turn.tokens / turn.seconds
        console.err.print(f"{turn.tokens} tokens, {rate:.1f} a second; {turn.reused} known before", soft_wrap=True)
