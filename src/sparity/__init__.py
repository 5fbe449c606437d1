"""Sparity makes a Hugging Face causal language model sparse and measures what that changed.

Importing this module is cheap (no torch); each name below is loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "SparityError": "sparity.errors",
    "Recipe": "sparity.recipe",
    "Result": "sparity.pipeline",
    "load": "sparity.models.loading",
    "perplexity": "sparity.quality.perplexity",
    "prune_weight": "sparity.static.prune_weight",
    "register": "sparity.registry",
    "run": "sparity.pipeline",
    "sensitivity": "sparity.pipeline.sensitivity",
    "sweep": "sparity.pipeline.sweeping",
}
__all__ = [
    "Recipe",
    "Result",
    "SparityError",
    "load",
    "perplexity",
    "prune_weight",
    "register",
    "run",
    "sensitivity",
    "sweep",
]

if TYPE_CHECKING:
    from sparity.errors import SparityError
    from sparity.models.loading import load
    from sparity.pipeline import Result, run
    from sparity.pipeline.sensitivity import sensitivity
    from sparity.pipeline.sweeping import sweep
    from sparity.quality.perplexity import perplexity
    from sparity.recipe import Recipe
    from sparity.registry import register
    from sparity.static.prune_weight import prune_weight


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparity' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # also outranks a submodule of the same name that the import bound
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
