"""Models whose blocks differ in size: what their configuration says of each, and how they are built from it.

transformers keeps such sizes in `per_layer_config` and checks them, but its models build every block from the global
ones. Here a model is built with the global sizes, and each block once more with its own.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import nn

SIZES = ("intermediate_size", "num_attention_heads", "num_key_value_heads")  # that may differ from block to block


def is_ragged(config: Any) -> bool:
    """Whether a configuration gives its blocks sizes of their own."""
    return bool(getattr(config, "is_heterogeneous", False)) and set(config.per_layer_attributes) <= set(SIZES)


def block_config(config: Any, index: int) -> Any:
    """The configuration of one block: the model's, with the block's own sizes."""
    return config.per_layer_config[index] if is_ragged(config) else config


def held_config(config: Any, index: int) -> Any:
    """As `block_config`, for a block to hold: how attention is computed stays what the model's configuration says."""
    found = block_config(config, index)
    if found is not config:
        found.__dict__["_whole"] = config
        kind: Any = type(config)
        found.__class__ = _held(kind)
    return found


@lru_cache
def _held(kind: Any) -> Any:
    def attention(self: Any) -> Any:
        return self.__dict__["_whole"]._attn_implementation

    return type(kind.__name__, (kind,), {"_attn_implementation": property(attention), "__module__": kind.__module__})


def plain_config(config: Any) -> Any:
    """The same configuration without sizes per block; it is left as it is."""
    plain = copy.deepcopy(config)
    plain.per_layer_config = None
    plain.__dict__.pop("allow_global_per_layer_attribute_access", None)
    return plain


def ragged_config(config: Any, sizes: Sequence[Mapping[str, int]]) -> Any:
    """A configuration whose blocks have these sizes: of every block the same attributes, by name.

    Globally it states the largest of each; where all blocks agree, nothing else.
    """
    found = plain_config(config)
    for name in sizes[0]:
        setattr(found, name, max(block[name] for block in sizes))
    if any(block != sizes[0] for block in sizes):
        found.per_layer_config = {index: dict(block) for index, block in enumerate(sizes)}
        hush()
        found.allow_global_per_layer_attribute_access = True  # what reads the largest as a bound may go on
    return found


def stated_sizes(config: Any) -> list[str]:
    """Which sizes a configuration states by an attribute of their own."""
    return [name for name in SIZES if isinstance(vars(config).get(name), int)]


@lru_cache
def ragged_kind(kind: Any, blocks: str) -> Any:
    """The class of models `kind` with blocks at the path `blocks`, each built with the sizes of its own.

    It keeps the name, by which checkpoints know their architecture.
    """

    def build(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        kind.__init__(self, plain_config(config), *arguments, **named)
        config._attn_implementation = self.config._attn_implementation
        found: Any = self.get_submodule(blocks)
        for index, block in enumerate(found):
            found[index] = type(block)(held_config(config, index), index)
        keep_config(self, config, found)

    made = type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__, "__doc__": kind.__doc__})
    made.__qualname__ = kind.__qualname__
    return made


def hush() -> None:
    """No warning each time that the largest size is read: what reads it here takes it for a bound."""
    from transformers.utils import logging

    logging.get_logger("transformers.integrations.heterogeneity.configuration_utils").setLevel(logging.ERROR)


def keep_config(model: nn.Module, config: Any, blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
    """Let all of a model but its blocks, which have their own, hold a configuration."""
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if "config" in module.__dict__ and module not in inside:
            module.config = config
