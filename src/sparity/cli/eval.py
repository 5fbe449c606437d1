"""`sparity eval MODEL`: perplexity, and KL, agreement and speed against another model."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from sparity.cli import console
from sparity.cli.options import Device, Dtype, Field, Json, Model


def evaluate(
    model: Model,
    text: Annotated[list[str] | None, typer.Option(help="Text or .npy of token ids; may be repeated.")] = None,
    against: Annotated[str | None, typer.Option(help="The dense model to compare with.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Only so many windows of each text; else all.")] = None,
    field: Field = "text",
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure perplexity on texts; with --against also KL, top-1 agreement and speed, the two taking turns."""
    with console.errors_in_one_line():
        from sparity.checkpoints.weight_files import is_read_packed
        from sparity.measure.timing.speed import compare_speed
        from sparity.models import transformers as hf
        from sparity.models.loading import load, load_tokenizer
        from sparity.models.transformers import context_length
        from sparity.pipeline.run.tokens import default_device, measured_text
        from sparity.quality.agreement import compare
        from sparity.quality.perplexity import perplexity
        from sparity.recipe import SpeedTest, Text

        place = default_device(device)
        if any(is_read_packed(hf.locate(name)) for name in (model, against) if name):
            place = "cpu"  # packed weights are multiplied there
        subject, tokenizer = load(model, device=place, dtype=dtype), load_tokenizer(model)
        dense = load(against, device=place, dtype=dtype) if against else None
        rows: list[dict[str, Any]] = []
        for name in text or ["python-docs:held-out"]:
            found = measured_text(Text.named(name, field), tokenizer, subject, window, windows)
            row: dict[str, Any] = {"text": found.name, "window": found.window}
            if dense is None:
                row["perplexity"] = perplexity(subject, found.ids, found.window)
            else:
                row |= asdict(compare(dense, subject, found.ids, found.window))
            rows.append(row)
        speed = None
        if dense is not None:
            test = SpeedTest.fitting(context_length(subject.config))
            speed = asdict(compare_speed(dense, subject, found.ids, test.prompt, test.tokens, test.rounds))
    if json:
        console.print_json({"model": model, "against": against, "quality": rows, "speed": speed})
        return
    table = Table(title=model if against is None else f"{model} against {against}")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.out.print(table)
    if speed is not None:
        ratio = speed["decode_ratio"]
        console.out.print(
            f"decode {speed['sparse']['decode']['median']:.1f} tokens/s, "
            f"dense {speed['dense']['decode']['median']:.1f}: "
            f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        )
        if (ours := speed["engine_dense"]) is not None:
            ratio = ours["decode_ratio"]
            console.out.print(
                f"dense on our kernels {ours['pace']['decode']['median']:.1f} tokens/s: "
                f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f}) is sparsity"
            )
