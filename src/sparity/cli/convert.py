"""`sparity convert SOURCE TARGET`: a checkpoint in another layout."""

from typing import Annotated

import typer

from sparity.cli import console
from sparity.cli.options import Force, Json, Quiet


def convert(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder or name.", show_default=False)],
    target: Annotated[str, typer.Argument(help="The folder of the result, or a file NAME.gguf.", show_default=False)],
    to: Annotated[
        str, typer.Option(help="packed, plain or gguf; auto: as TARGET ends, plain from packed, else packed.")
    ] = "auto",
    values: Annotated[str, typer.Option(help="Of packed matrices: an encoding (sparity methods encoding).")] = "same",
    embeddings: Annotated[str, typer.Option(help="Of the embedding and the head: an encoding.")] = "same",
    prefer: Annotated[
        str, typer.Option(help="Of packed matrices: memory = the smallest format, speed = the fastest here.")
    ] = "memory",
    coding: Annotated[str, typer.Option(help="Of packed matrices in the files: none or huffman.")] = "none",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pack a plain checkpoint, or make a packed one plain again; every weight comes back bit for bit.

    A packed checkpoint stores the weights that are not zero, and runs on sparse kernels. Loading it with transformers
    needs `import sparity`. With --values int8 the packed weights are quantised, with a scale per output; with --values
    int4, or "{int4: {group: 64}}", with a scale per group, which is that of the stage quantize where a model has been
    through it; --embeddings does the same to the embedding and the head. With --prefer speed the formats are timed on
    this machine, and a matrix that is fastest dense stays dense. With --coding huffman the files are smaller where few
    values occur, and are decoded when they are loaded. The layouts sparse-bitmask and sparse-24-bitmask of
    compressed-tensors are read too.

    A Llama is written as a GGUF file for llama.cpp; one whose blocks differ in size as architecture deci.
    """
    with console.errors_in_one_line():
        from sparity.checkpoints.weight_files import weight_bytes
        from sparity.errors import InvalidInput
        from sparity.formats import Encoding, build_encoding
        from sparity.measure.show.numbers import size
        from sparity.models import transformers as hf
        from sparity.models.gguf_export import export_gguf
        from sparity.pipeline.run.format_choices import dense_words
        from sparity.pipeline.run.packing import convert as run
        from sparity.pipeline.run.result_folder import named_folder
        from sparity.recipe_file import parse_yaml

        def encoding(option: str, given: str) -> Encoding:
            try:
                return build_encoding(parse_yaml(given))
            except ValueError as error:
                raise InvalidInput(f"--{option} {given}: {error}") from error

        asked = encoding("values", values), encoding("embeddings", embeddings)
        if prefer not in ("memory", "speed"):
            raise InvalidInput(f"--prefer {prefer}: memory or speed")
        if coding not in ("none", "huffman"):
            raise InvalidInput(f"--coding {coding}: none or huffman")
        if to not in ("auto", "packed", "plain", "gguf"):
            raise InvalidInput(f"--to {to}: packed, plain, gguf or auto")
        place, before = named_folder(target), weight_bytes(hf.locate(source))
        if to == "gguf" or (to == "auto" and place.suffix == ".gguf"):
            export_gguf(source, place, force)
            layout, after, reason = "gguf", place.stat().st_size, None
        else:
            layout = run(source, place, asked[0], force, None if to == "auto" else to, prefer, asked[1], coding)  # type: ignore[arg-type]
            after, reason = weight_bytes(place), dense_words(place)
    if json:
        console.print_json(
            {"target": str(place), "layout": layout, "bytes_before": before, "bytes_after": after, "note": reason}
        )
    elif not quiet:
        console.out.print(
            f"{place}: {layout}, weights {size(after)} (before {size(before)}){f'; {reason}' if reason else ''}",
            soft_wrap=True,
        )
