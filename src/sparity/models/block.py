"""One decoder block: its projections, the inputs they share, and how to run it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparity.errors import InvalidInput
from sparity.products.float32 import float32_products

FEATURES = (("out_features", "in_features"), ("nf", "nx"))  # what nn.Linear and Conv1D call their two sizes


@dataclass(frozen=True)
class Projection:
    """A weight matrix of a block, shown as `[out, in]` however its module stores it.

    `rows` selects the outputs from start to stop of a fused matrix (q, k and v in one, gate and up in one);
    `expert` selects one matrix of a three-dimensional parameter; `transposed` says that the module keeps `[in, out]`,
    as GPT-2's `Conv1D` does.
    """

    name: str
    role: str
    module: nn.Module
    rows: tuple[int, int] | None = None
    transposed: bool = False
    parameter: str = "weight"
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """A view `[out, in]` of the stored weight; writing into it changes the module."""
        return self.shown(self.stored.data)

    @property
    def stored(self) -> nn.Parameter:
        """The parameter that holds the weight, and perhaps others."""
        return self.module.get_parameter(self.parameter)

    @property
    def gradient(self) -> Tensor | None:
        """The part `[out, in]` of the stored parameter's gradient that belongs to the weight; None without one."""
        gradient = self.stored.grad
        return None if gradient is None else self.shown(gradient)

    def shown(self, stored: Tensor) -> Tensor:
        """The part `[out, in]`, as a view, that belongs to the weight in a tensor of the stored parameter's shape."""
        if self.expert is not None:
            stored = stored[self.expert]
        matrix = stored.T if self.transposed else stored
        return matrix if self.rows is None else matrix[slice(*self.rows)]

    def write(self, weight: Tensor) -> None:
        """Store `weight` [out, in], cast to the module's own type."""
        self.weight.copy_(weight)

    def replace(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Put `weight` [out, in], of any shape, in place of the stored one, cast to the module's own type.

        `bias` [out] takes the place of the module's bias, which otherwise stays.

        Raises:
            InvalidInput: the stored parameter holds other projections too, or the bias does not fit.
        """
        if self.rows is not None or self.expert is not None:
            raise InvalidInput(
                f"{self.name} shares its stored parameter with other projections and cannot be replaced alone: "
                "cut the block instead (cut_block)"
            )
        had = getattr(self.module, "bias", None)
        if had is None and bias is not None:
            raise InvalidInput(f"{self.name} has no bias: replace its weight alone")
        left = had if bias is None else bias
        if left is not None and left.shape != weight.shape[:1]:
            raise InvalidInput(
                f"{self.name}: a weight {list(weight.shape)} needs a bias of {len(weight)} numbers, not "
                f"{list(left.shape)}: give one that fits"
            )
        if bias is not None:
            set_parameter(self.module, "bias", bias)
        set_parameter(self.module, self.parameter, weight.T.contiguous() if self.transposed else weight)
        set_features(self.module, *weight.shape)


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter of any shape in place of one of the same name, in that one's type and on its device."""
    old = module.get_parameter(name)
    new = value.detach().to(old)
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


def set_features(module: nn.Module, outputs: int, inputs: int) -> None:
    """Keep what a linear module says of its sizes true."""
    for out_name, in_name in FEATURES:
        if hasattr(module, out_name):
            setattr(module, out_name, outputs)
            setattr(module, in_name, inputs)


def in_features(module: nn.Module) -> int:
    """The input channels that a linear module has, packed ones too."""
    return int(next(getattr(module, name) for _, name in FEATURES if hasattr(module, name)))


def out_features(module: nn.Module) -> int:
    """The outputs that a linear module has, packed ones too."""
    return int(next(getattr(module, name) for name, _ in FEATURES if hasattr(module, name)))


def first_argument(module: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    """The input of an ordinary projection."""
    inputs: Tensor = arguments[0]
    return inputs


@dataclass(frozen=True)
class InputSite:
    """A point of a block whose activations feed one or more projections.

    `inputs_of` finds the site's inputs in a call of the module that holds its projections.
    """

    name: str
    projections: tuple[Projection, ...]
    inputs_of: Callable[[nn.Module, tuple[Any, ...]], Tensor] = first_argument

    @contextmanager
    def watch(self, see: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `see` with the inputs `[tokens, in]` of the site, a batch at a time, while the context is open."""

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs = self.inputs_of(module, arguments)
            see(inputs.reshape(-1, inputs.shape[-1]))

        handle = self.projections[0].module.register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class BlockInputs:
    """What the model hands to its blocks: hidden states, and the other arguments of every block.

    `arguments[b][i]` are the keyword arguments of block `i` for batches of `b` sequences.
    """

    hidden: Tensor  # [samples, tokens, hidden]
    arguments: Mapping[int, list[dict[str, Any]]]
    batch: int


@dataclass(frozen=True)
class Block:
    """A decoder block with its weights loaded."""

    index: int
    name: str
    module: nn.Module
    sites: tuple[InputSite, ...]

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections, in the order of their inputs."""
        return tuple(projection for site in self.sites for projection in site.projections)

    def output(self, inputs: BlockInputs, hidden: Tensor) -> Tensor:
        """What the block makes of one batch `[batch, tokens, hidden]` on its own device."""
        output: Tensor | tuple[Tensor, ...] = self.module(hidden, **inputs.arguments[len(hidden)][self.index])
        return output[0] if isinstance(output, tuple) else output  # hidden states alone, or first in a tuple

    def run(self, inputs: BlockInputs, hidden: Tensor, into: Tensor | None = None) -> None:
        """Send `hidden` [samples, tokens, hidden] through the block; outputs go to `into`, which may be `hidden`."""
        device = next(self.module.parameters()).device
        with torch.no_grad(), float32_products():
            for start in range(0, len(hidden), inputs.batch):
                part = hidden[start : start + inputs.batch].to(device)
                output = self.output(inputs, part)
                if into is not None:
                    into[start : start + inputs.batch] = output
