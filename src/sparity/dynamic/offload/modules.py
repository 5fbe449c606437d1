"""Linear layers whose weight is on disk, neuron by neuron: only what counts for the tokens of a call is in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparity.dynamic.activations.predicted_skips import NeuronSkip
from sparity.dynamic.offload.far_layer import FarLayer
from sparity.dynamic.offload.fixed import Fixed
from sparity.engine.kernels.slots import cpu, reference
from sparity.errors import InvalidInput

Names = Callable[[Tensor], Tensor]  # a module's input -> the units that count, rising


class FarModule(Fixed, nn.Module):
    """What is common: an MLP's layer on disk, and the sizes that a linear layer states."""

    bias: nn.Parameter | None

    def __init__(self, layer: FarLayer, part: int, like: nn.Module, begins: bool) -> None:
        """Stand in for `like`, whose bias is taken over; `begins`: it is the first of its MLP to need neurons."""
        super().__init__()
        linear: Any = like
        self.layer, self.part, self.begins = layer, part, begins
        self.in_features, self.out_features = int(linear.in_features), int(linear.out_features)
        self.register_parameter("bias", linear.bias)

    def slots(self, units: Tensor) -> Tensor:
        """Where the units lie, int32, read if they have to be."""
        return self.layer.take(units) if self.begins else self.layer.here(units)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.layer.words}"


class FarRows(FarModule):
    """Rows of gate, up or fc1 on disk. Outputs of neurons that do not count are 0: nothing reads them."""

    def __init__(self, layer: FarLayer, part: int, like: nn.Module, begins: bool) -> None:
        super().__init__(layer, part, like, begins)
        self.names: Names = self.named

    def named(self, x: Tensor) -> Tensor:
        """The neurons that the predictor in front of this layer names for `x`; all where there is none."""
        skip = next((hook for hook in self._forward_hooks.values() if isinstance(hook, NeuronSkip)), None)
        if skip is not None:
            flags = skip.tokens.of(x)
            if flags is None or bool(flags.all()):
                return counting(skip.predictor.keep(x))
        return torch.arange(self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> `[..., neurons]`."""
        flat, units = x.reshape(-1, self.in_features), self.names(x)
        slots, part = self.slots(units), self.layer.arena.parts[self.part]
        if cpu.declines(part, flat) is None:
            found = cpu.slot_rows(part, slots, flat, self.layer.slots.hot_range)
        else:
            found = reference.slot_rows(part, slots, flat)
        if self.bias is not None:
            found = found + self.bias[units]
        out = flat.new_zeros(len(flat), self.out_features)
        out[:, units] = found
        return out.view(*x.shape[:-1], self.out_features)


class FarColumns(FarModule):
    """Columns of down or fc2 on disk: those whose inputs are 0 for all tokens of a call are not needed."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., neurons] -> `[..., out]`."""
        flat = x.reshape(-1, self.in_features)
        units = counting(flat != 0)
        slots, part = self.slots(units), self.layer.arena.parts[self.part]
        product = cpu.slot_columns if cpu.declines(part, flat) is None else reference.slot_columns
        out = product(part, slots, units, flat).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class Note:
    """A forward hook of an activation function: notes the neurons that are not 0, for the layer beside it."""

    def __init__(self) -> None:
        self._units: Tensor | None = None

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        """Note them."""
        self._units = counting(output != 0)

    def take(self, x: Tensor) -> Tensor:
        """What was noted in this call of the MLP."""
        units, self._units = self._units, None
        if units is None:
            raise InvalidInput("an MLP whose weights are on disk is called as a whole, its activation function first")
        return units


def counting(used: Tensor) -> Tensor:
    """Bool `[..., units]` -> the units that count for some token, rising."""
    return used.reshape(-1, used.shape[-1]).any(0).nonzero()[:, 0]
