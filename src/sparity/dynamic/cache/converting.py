"""Caches that a model is called with get layers with the policy."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from sparity.dynamic.cache.layer import PolicyLayer
from sparity.dynamic.cache.run import Run
from sparity.errors import InvalidInput


def layers_of(model: Any) -> Sequence[bool]:
    """Of each layer whether its cache holds the whole text, so that a policy can choose from it."""
    made = DynamicCache(config=model.config.get_text_config(decoder=True))
    return [type(layer) is DynamicLayer for layer in made.layers]


def before_call(model: Any, run: Run, module: nn.Module, arguments: Any, named: dict[str, Any]) -> Any:
    """Before a call: its cache gets layers with the policy."""
    if len(arguments) > 1:  # a cache may be given by its place
        named = {**signature(module.forward).bind_partial(*arguments).arguments, **named}
        arguments = ()
    given = named.get("past_key_values")
    if given is None:
        wanted = named.get("use_cache")
        if not (getattr(model.config, "use_cache", True) if wanted is None else wanted) or _without_cache(module):
            return None
        given = DynamicCache(config=model.config.get_text_config(decoder=True))
    convert(given, run, len(layers_of(model)))
    return arguments, {**named, "past_key_values": given}


def _without_cache(module: Any) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False) and module.training)


def convert(given: Any, run: Run, layers: int) -> None:
    """Give a cache's ordinary layers the policy, in place; one that has it stays.

    Raises:
        InvalidInput: a cache of another kind, or of another run.
    """
    if type(given) is not DynamicCache or given.offloading:
        kind = "an offloaded cache" if getattr(given, "offloading", False) else f"a {type(given).__name__}"
        raise InvalidInput(
            f"a policy works in transformers' DynamicCache, not in {kind}: leave `cache_implementation` out"
        )
    if given.layer_class_to_replicate is DynamicLayer:
        given.layers += [DynamicLayer() for _ in range(layers - len(given.layers))]
    for index, layer in enumerate(given.layers):
        if isinstance(layer, PolicyLayer):
            if layer.run is not run and (layer.length or layer.run.open):
                raise InvalidInput("this cache was filled under another policy: begin with an empty one")
            layer.run = run
        elif isinstance(layer, DynamicLayer) and type(layer).__name__ in ("DynamicLayer", "GrowingLayer"):
            given.layers[index] = PolicyLayer.of(layer, run, index)
    _link(given.layers, run)


def _link(layers: Sequence[Any], run: Run) -> None:
    """Let layers know those with which they are merged, and all others one that is."""
    for later, earlier in run.pairs.items():
        layers[later].partner = layers[earlier]
    for index, layer in enumerate(layers):
        if run.pairs and isinstance(layer, PolicyLayer) and index not in {*run.pairs, *run.pairs.values()}:
            layer.merged = layers[next(iter(run.pairs))]
