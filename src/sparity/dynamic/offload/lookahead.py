"""What the next layer will need is read while this one computes: its decision is made early, from this layer's input.

The residual stream changes little from layer to layer, so what layer l reads says much about what layer l + 1 will
(LLM in a flash; ActiveFlow, 2504.08378). What was not foreseen is read when it is needed: results stay the same.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from sparity.dynamic.activations.places import Place
from sparity.dynamic.activations.predicted_skips import NeuronSkip
from sparity.dynamic.offload.deciding import Kind
from sparity.dynamic.offload.far_layer import FarLayer
from sparity.dynamic.offload.fixed import Fixed
from sparity.dynamic.offload.modules import counting
from sparity.engine.modules.skips import output_skip_of, skip_of

MOST_TOKENS = 4  # of a call; more need most units anyway
Guess = Callable[[Tensor], Tensor]  # `[tokens, hidden]` -> the units that a layer will need, rising


class Lookahead(Fixed):
    """A forward pre-hook of what reads a layer's input: has the next layer's guess read by another thread."""

    def __init__(self, layer: FarLayer, guess: Guess, pool: ThreadPoolExecutor) -> None:
        self._layer, self._guess, self._pool = layer, guess, pool

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Begin to read."""
        x = arguments[0].detach()
        x = x.reshape(-1, x.shape[-1])
        if len(x) <= MOST_TOKENS:
            self._layer.wait()
            self._layer.expect(self._pool.submit(self._read, x))

    def _read(self, x: Tensor) -> None:
        with torch.no_grad():
            self._layer.ahead(self._guess(x).numpy())


def guess_of(place: Place, kind: Kind) -> Guess:
    """What a layer of neurons will need, by the input of the layer before."""

    def neurons(x: Tensor) -> Tensor:
        first: Any = place.reads[0].module
        if kind == "predictor":
            skip = next((hook for hook in first._forward_hooks.values() if isinstance(hook, NeuronSkip)), None)
            return torch.arange(0) if skip is None else counting(skip.predictor.keep(x))
        inner = _linear(first, x)
        inner = place.module.forward(inner)
        masked = output_skip_of(place.module)
        if kind == "output":
            if len(place.reads) == 2:
                inner = inner * _linear(place.reads[1].module, x)
            masked = masked or skip_of(place.saves[-1].module)  # type: ignore[assignment]
        if masked is None:
            return counting(inner != 0)
        return counting(masked.rule.like(inner).keep(inner) & (inner != 0))

    return neurons


def guess_of_router(router: Any) -> Guess:
    """The experts that a router will name, by the input of the layer before."""

    def experts(x: Tensor) -> Tensor:
        chosen: Tensor = router.forward(x)[-1].unique()
        return chosen

    return experts


def _linear(module: Any, x: Tensor) -> Tensor:
    """A projection without its hooks."""
    product: Tensor = nn.functional.linear(x, module.weight, module.bias)
    return product
