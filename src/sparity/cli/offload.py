"""`sparity offload MODEL`: a model written so that its neurons, or experts, can stay on disk."""

from typing import Annotated, Any

import typer

from sparity.cli import console
from sparity.cli.options import CalibrationText, Dtype, Field, Force, Json, Model, Quiet, ResultFolder, Seed


def offload(
    model: Model,
    output: ResultFolder,
    memory: Annotated[
        str | None, typer.Option(help='Also say what a token must wait for within so much memory, such as "1.5GB".')
    ] = None,
    text: CalibrationText = None,
    field: Field = "text",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sample.")] = 128,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model that can run in less memory than its weights take: sparity generate OUTPUT PROMPT --memory 1.5GB.

    Neurons are read when a token needs them, so something must say which ones count: ReLUs do, an `activations` stage
    of the saved model does (cats, chess, dejavu, any at hidden), and the router of a mixture of experts.
    Calibration text says which are needed most often; without --text it is Python's own documentation.
    """
    with console.errors_in_one_line():
        from dataclasses import asdict

        from sparity.dynamic.offload.loading import ATTRIBUTE, load_offloaded
        from sparity.dynamic.offload.writing import offload as write
        from sparity.measure.show.numbers import size
        from sparity.models import transformers as hf
        from sparity.models.loading import load_tokenizer
        from sparity.pipeline.run.tokens import calibration_tokens
        from sparity.recipe import Calibration

        tokenizer, tokens = load_tokenizer(model), None
        if tokenizer is not None or text is not None:
            chosen: dict[str, Any] = {"samples": samples, "length": length, "seed": seed, "field": field}
            chosen |= {"text": "python-docs:calibration", "documents": "joined"} if text is None else {"text": text}
            if text is not None and text.endswith(".npy"):
                chosen = {"tokens": text}
            section = Calibration.model_validate(chosen)
            tokens = calibration_tokens(section, tokenizer, hf.read_config(hf.locate(model)))
        written = write(model, output, tokens=tokens, dtype=dtype, force=force)
        bound = None
        if memory is not None:
            held = getattr(load_offloaded(written.folder, memory), ATTRIBUTE)
            held.close()
            bound = held.bound
    if json:
        said = {**asdict(written), "folder": str(written.folder)}
        console.print_json(said | ({} if bound is None else {"bound": {**asdict(bound), "seconds": bound.seconds}}))
    elif not quiet:
        console.out.print(
            f"{written.folder}: {size(written.far_bytes)} on disk in records of {size(written.record_bytes)} "
            f"({written.words}), {size(written.resident_bytes)} always in memory; {size(written.least_bytes)} is the "
            "least that it runs in",
            soft_wrap=True,
        )
        if bound is not None:
            console.out.print(f"within {memory}: {bound.words}", soft_wrap=True)
