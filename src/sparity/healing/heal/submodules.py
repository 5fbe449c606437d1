"""A block's attention and its MLP, each as what is run alone on what it was given in the whole block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparity.healing.heal.side_by_side import Side
from sparity.models import Block
from sparity.models.block import Projection
from sparity.models.float32 import in_float
from sparity.products.float32 import float32_products

ATTENTION = ("q", "k", "v", "qkv", "o")


@dataclass(frozen=True)
class Submodule:
    """The smallest module of a block that holds some projections: attention, the MLP, or the block where there is none.

    Attributes:
        name: "attention" or "mlp".
        path: of the module within the block.
        projections: that it holds.
    """

    name: str
    path: str
    projections: tuple[Projection, ...]


@dataclass(frozen=True)
class Call:
    """How a module was called for one sequence, in float32."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]


def submodules(block: Block) -> list[Submodule]:
    """A block's attention, then its MLP."""
    paths = {id(module): path for path, module in block.module.named_modules()}
    found = []
    for name, chosen in (
        ("attention", [each for each in block.projections if each.role in ATTENTION]),
        ("mlp", [each for each in block.projections if each.role not in ATTENTION]),
    ):
        if chosen:
            found.append(Submodule(name, _common([paths[id(each.module)] for each in chosen]), tuple(chosen)))
    return found


def calls(side: Side, index: int, path: str) -> tuple[list[Call], list[Tensor]]:
    """How a module of a block is called for every sequence, and what it gives, in float32."""
    module, noted, given = side.block(index).module.get_submodule(path), list[Call](), list[Tensor]()

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        noted.append(Call(in_float(arguments), in_float(named)))
        given.append(first_of(output).float())

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        for sample in range(len(side.hidden)):
            side.forward(index, sample)
    finally:
        handle.remove()
    return noted, given


def run(module: nn.Module, call: Call) -> Tensor:
    """What a module gives for a call."""
    with float32_products():
        return first_of(module(*call.arguments, **call.named))


def first_of(output: Any) -> Tensor:
    """The hidden states of what a module gives."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _common(paths: Sequence[str]) -> str:
    """The longest path that all begin with, in whole names; that of the owner where there is one path alone."""
    if len(set(paths)) == 1:
        return paths[0].rpartition(".")[0]
    found: list[str] = []
    for level in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(level)) > 1:
            break
        found.append(level[0])
    return ".".join(found)


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """|found - wanted|^2 / |wanted|^2, `[]`."""
    energy: Tensor = wanted.square().sum().clamp_min(torch.finfo(wanted.dtype).tiny)
    return (found - wanted).square().sum() / energy
