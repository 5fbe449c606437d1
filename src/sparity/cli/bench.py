"""`sparity bench MODEL`: how fast it generates, beside other models and other ways to compute it."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparity.cli import console
from sparity.cli.options import Force, Json, Quiet, Threads

if TYPE_CHECKING:
    from torch import Tensor

RESULTS = ("bench.json", "bench.html")


def bench(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder or name, plain or packed, or zoo:llama.", show_default=False)
    ],
    against: Annotated[
        str, typer.Option(help="Opponents: dense, transformers (both with the same weights), other models.")
    ] = "dense,transformers",
    batch: Annotated[str, typer.Option(help="Sequences generated at once.")] = "1,8,32",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens timed after the first.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Measurements, after one that does not count.")] = 5,
    threads: Threads = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="A folder for bench.json and bench.html.")
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time generation: first token, each token after it, memory; every contender in turns, in bfloat16 on the CPU.

    A contender is the model itself on the engine; "dense", its weights held dense on the engine; "transformers", its
    weights held dense in stock transformers; or another model. Batches that do not fit into memory are left out.
    """
    with console.errors_in_one_line():
        import torch

        from sparity.errors import InvalidInput
        from sparity.files import make_folder, write_json, write_text
        from sparity.measure.show.page_bench import render_bench
        from sparity.measure.show.table_bench import print_bench
        from sparity.measure.timing.bench import Protocol
        from sparity.measure.timing.bench import bench as run
        from sparity.measure.timing.contenders import contenders
        from sparity.pipeline.run.result_folder import named_folder

        folder = None if output is None else named_folder(output)
        if folder is not None and not force and any((folder / name).exists() for name in RESULTS):
            raise InvalidInput(
                f"{folder} holds a benchmark already: choose another output or pass --force to replace it"
            )
        if folder is not None:
            make_folder(folder)  # before anything is measured
        if threads is not None:
            torch.set_num_threads(threads)
        every = contenders(model, [name.strip() for name in against.split(",") if name.strip()])
        protocol = Protocol(prompt, tokens, rounds, _batches(batch))
        with console.ProgressBar(quiet or json) as progress:
            report = run(every, _text(every[-1].folder), protocol, progress.phase)
        if folder is not None:
            write_json(folder / RESULTS[0], report.to_dict())
            write_text(folder / RESULTS[1], render_bench(report))
    if json:
        console.print_json(report.to_dict())
    elif not quiet:
        print_bench(report, console.out)
        if folder is not None:
            console.out.print(f"saved to {folder}; page: {folder / RESULTS[1]}", soft_wrap=True)


def _batches(given: str) -> tuple[int, ...]:
    """Sizes from "1,8,32", the smallest first."""
    from sparity.errors import InvalidInput

    parts = [part.strip() for part in given.split(",")]
    if not all(re.fullmatch("[1-9][0-9]{0,4}", part) for part in parts):
        raise InvalidInput(f"--batch {given}: write whole numbers from 1, such as 1,8,32")
    return tuple(sorted({int(part) for part in parts}))


def _text(folder: Path) -> "Tensor":
    """Ids of Python's documentation, which is always at hand, or the first ids of a model without a tokenizer."""
    import torch

    from sparity.calibration.text import read_documents
    from sparity.models import transformers as hf
    from sparity.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return torch.arange(hf.read_config(folder).vocab_size)
    documents = read_documents("python-docs:held-out", "text")
    return torch.tensor(tokenizer("\n\n".join(documents), verbose=False)["input_ids"])
