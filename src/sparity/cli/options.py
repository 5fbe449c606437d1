"""Options that several verbs share, with their words."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Of the processor.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ... or auto.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
MemoryLimit = Annotated[
    str | None, typer.Option("--memory", help='Of the run beside Python and PyTorch, such as "5GB"; measuring apart.')
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what was begun and not finished.")]
ResultFolder = Annotated[str, typer.Option("--output", "-o", help="The folder of the result.", show_default=False)]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it: stages.0.prune.sparsity=0.6 ...")]
OtherModel = Annotated[str | None, typer.Option(help="A model in place of the recipe's.")]
Model = Annotated[
    str, typer.Argument(help="A Hugging Face folder or name, a GGUF file, or one of the zoo.", show_default=False)
]
CalibrationText = Annotated[str | None, typer.Option(help="Calibration text: file or data set name[:split].")]
Field = Annotated[str, typer.Option(help="The column that holds the text.")]
Length = Annotated[int | None, typer.Option(help="Tokens per sample.")]
Seed = Annotated[int, typer.Option(help="Seed of the calibration samples.")]
Score = Annotated[str | None, typer.Option(help="How much a weight matters (sparity methods score).")]
Pattern = Annotated[str, typer.Option(help="unstructured, N:M (N kept of M) or block:ROWSxCOLUMNS.")]
Solver = Annotated[str, typer.Option(help="How the weights that stay make up for it (sparity methods solver).")]
