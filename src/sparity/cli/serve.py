"""`sparity serve MODEL`: a server with OpenAI's interface."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from sparity.cli import console
from sparity.cli.options import Threads

NEEDED = ("starlette", "uvicorn", "prometheus_client")  # the extra `serve`
Slots = Annotated[int, typer.Option(min=1, max=64, help="Requests that are worked on at a time.")]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of a request; what the model takes.")]
Template = Annotated[Path | None, typer.Option(help="A chat template (Jinja) in place of the tokenizer's own.")]


def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder or name, plain or packed, a GGUF file, or zoo:llama.", show_default=False
        ),
    ],
    host: Annotated[str, typer.Option(help="The address that it listens at; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="By which requests ask for the model; MODEL.")] = None,
    slots: Slots = 8,
    context: Context = None,
    step_tokens: Annotated[
        int, typer.Option(min=1, max=1024, help="Tokens that are computed at a time, of all requests.")
    ] = 32,
    prefix_cache: Annotated[
        int, typer.Option(min=0, help="Megabytes for keys and values of texts that were read before.")
    ] = 256,
    queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; a request beyond is refused (429).")] = 256,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds in which a request must be answered.")] = 600.0,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1_000_000,
    api_key: Annotated[
        str | None, typer.Option(envvar="SPARITY_API_KEY", help="That clients must show.", show_default=False)
    ] = None,
    chat_template: Template = None,
    dense: Annotated[
        str | None,
        typer.Option(help="The dense model, which scores a sample of the answers and takes over.", show_default=False),
    ] = None,
    guard_share: Annotated[float, typer.Option(min=0, max=1, help="The share of answers that is scored.")] = 0.02,
    guard_kl: Annotated[
        float, typer.Option(min=1e-6, help="Nats per token that answers may be from the dense model, in the mean.")
    ] = 0.1,
    beside: Annotated[
        str | None, typer.Option(help="Another model, which answers a share of the requests.", show_default=False)
    ] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="The share that --beside answers.")] = 0.5,
    threads: Threads = None,
) -> None:
    """Answer requests over HTTP with OpenAI's interface.

    A model in bfloat16 runs on Sparity's engine, many requests together; what one is answered never depends on the
    others. Models and run-time stages that the engine's step does not know answer one request after another. With
    --dense a sample of the answers is scored by the dense model, which takes over while they are too far from its own;
    with --beside another model answers a share of the requests, and the metrics tell the two apart.
    """
    with console.errors_in_one_line():
        check_installed()
        import torch

        from sparity.serve.guard.guard import Bounds, Guard
        from sparity.serve.http.app import Limits, create_app
        from sparity.serve.http.server import run
        from sparity.serve.served_model import open_model
        from sparity.serve.service import Service, Split

        if threads is not None:
            torch.set_num_threads(threads)
        options: dict[str, Any] = {
            "name": name or model,
            "slots": slots,
            "context": context,
            "most": step_tokens,
            "prefix_bytes": prefix_cache * 1_000_000,
            "template": None if chat_template is None else chat_template.read_text(encoding="utf-8"),
        }
        served = [open_model(model, **options)]
        guard = None
        if dense is not None:
            shadow = open_model(dense, runtime=False, **options)
            guard = Guard(served[0], shadow, Bounds(share=guard_share, kl=guard_kl))
        split = None if beside is None else Split(open_model(beside, **options), share)
        limits = Limits(body=max_body, waiting=queue, seconds=timeout, key=api_key)
        service = Service(served, guard, split)
        run(create_app(service, limits), host, port, lambda url: _greet(url, service.every))


def check_installed() -> None:
    """Refuse to go on where what a server needs is not installed."""
    from sparity.errors import InvalidInput

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InvalidInput(f"a server needs {', '.join(missing)}: pip install 'sparity[serve]'")


def _greet(url: str, models: Sequence[Any]) -> None:
    for served in models:
        execution = served.execution
        kind = "" if served.kind == "model" else f", {served.kind}"
        console.err.print(
            f"{served.name}{kind}: {execution.words}; {execution.context} tokens of context", soft_wrap=True
        )
    console.err.print(f"listening at {url}/v1 (interrupt to stop)", soft_wrap=True)
