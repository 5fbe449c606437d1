"""Which projections a configuration means: its names are parts of theirs, or globs."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from sparity.errors import InvalidInput, suggestion
from sparity.models import Decoder
from sparity.stages.allocation import projections


def named(pattern: str, name: str) -> bool:
    """Whether `self_attn.q_proj`, `layers.1` or a glob names a module, by whole parts of its name."""
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def left_dense(model: Decoder, targets: Sequence[str] | None, excluded: Sequence[str] | None) -> list[str]:
    """The names of the projections that stay as they are.

    Names of what is never pruned, such as the embedding and the head, may be excluded.

    Raises:
        InvalidInput: a name that means nothing in this model, a target that is no projection of a block, or nothing
            left to prune.
    """
    names = [projection.name for _, projection in projections(model)]
    modules = [name for name, _ in model.skeleton.named_modules() if name]
    for field, patterns, known in (("target_layers", targets, names), ("exclude_layers", excluded, modules + names)):
        for pattern in patterns or ():
            if not any(named(pattern, name) for name in known):
                last = sorted({name.rpartition(".")[2] for name in known})
                what = "projection" if field == "target_layers" else "part"
                raise InvalidInput(
                    f"SparsityConfig.{field}: {pattern} names no {what} of this model"
                    f"{suggestion(pattern.rpartition('.')[2], last)} ({what}s: {', '.join(last)})"
                )
    left = [
        name
        for name in names
        if (targets is not None and not any(named(pattern, name) for pattern in targets))
        or any(named(pattern, name) for pattern in excluded or ())
    ]
    if len(left) == len(names):
        raise InvalidInput("SparsityConfig: every projection is left out: nothing is left to prune")
    return left


def widths(model: Decoder) -> set[int]:
    """The widths of the rows of all projections."""
    return {projection.weight.shape[1] for _, projection in projections(model)}


def counted(model: str | Path) -> Iterator[tuple[str, int, int]]:
    """Of every projection its name as the specification writes it, `layer.0.mlp.up_proj`, its zeros and its size."""
    decoder = Decoder.open(model)
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            for projection in block.projections:
                name = projection.name.removeprefix(f"{block.name}.")
                yield f"layer.{index}.{name}", int((projection.weight == 0).sum()), projection.weight.numel()
