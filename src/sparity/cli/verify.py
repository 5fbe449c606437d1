"""`sparity verify PATH`: is a finished folder what its record says?"""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from sparity.cli import console
from sparity.cli.options import Json, Quiet


def verify(
    path: Annotated[Path, typer.Argument(help="A folder that Sparity wrote.", show_default=False)],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Recompute hashes, shapes, zeros and what each stage promised; exit code 1 when anything differs."""
    with console.errors_in_one_line():
        from sparity.measure.show.numbers import size
        from sparity.measure.show.sentences import describe_coding
        from sparity.pipeline.run.verify import verify as check

        found = check(path)
    if json:
        console.print_json(dataclasses.asdict(found))
    else:
        for problem in found.problems:
            console.err.print(problem, style="red", soft_wrap=True)
        if not quiet and not found.problems:
            coding = describe_coding(found.coded)
            console.out.print(
                f"{found.path}: {found.files} files unchanged, weights {size(found.bytes)}"
                f"{f' ({coding})' if coding else ''}, {len(found.projections)} projections, "
                f"{'; '.join(found.stages)}, realised sparsity {found.zeros:.4%}",
                soft_wrap=True,
            )
    if found.problems:
        raise typer.Exit(1)
