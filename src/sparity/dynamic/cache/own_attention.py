"""The attention function that a model would call if none of ours stood before it."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparity.errors import UnsupportedModel


def own_attention(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function of a name; "eager" is the one of the module's own file.

    Raises:
        UnsupportedModel: it has none.
    """
    if name != "eager":
        function: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[name]
        return function
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise UnsupportedModel(f"{type(module).__name__} has no eager attention that could be called: load with sdpa")
    own: Callable[..., tuple[Tensor, Any]] = found
    return own
