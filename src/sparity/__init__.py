"""Sparity makes a Hugging Face causal language model sparse and measures what that changed.

Importing this module is cheap (no torch); each name below is loaded when first used.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "SparityError": "sparity.errors",
    "Recipe": "sparity.recipe",
    "Result": "sparity.pipeline.run.runner",
    "activation_mask": "sparity.dynamic.activations.functions",
    "attach": "sparity.engine.attach",
    "attached": "sparity.engine.attach",
    "attention_blocks": "sparity.dynamic.attention.functions",
    "cache": "sparity.dynamic.cache.attaching",
    "cache_budgets": "sparity.dynamic.cache.budgets",
    "calibrate_attention": "sparity.dynamic.attention.calibrating",
    "calibrate_cache": "sparity.dynamic.cache.calibrating",
    "cut": "sparity.static.structure.functions",
    "fit_activations": "sparity.dynamic.activations.functions",
    "load": "sparity.models.loading",
    "load_offloaded": "sparity.dynamic.offload.loading",
    "offload": "sparity.dynamic.offload.writing",
    "perplexity": "sparity.quality.perplexity",
    "plan_shape": "sparity.pipeline.studies.shapes.study",
    "prune_weight": "sparity.static.prune.prune_weight",
    "quantize_cache": "sparity.dynamic.cache.quantised",
    "quantize_weight": "sparity.static.quantize.quantize_weight",
    "register": "sparity.registry",
    "restructure": "sparity.static.structure.functions",
    "run": "sparity.pipeline.run.runner",
    "score_cache": "sparity.dynamic.cache.functions",
    "select_cache": "sparity.dynamic.cache.functions",
    "sensitivity": "sparity.pipeline.studies.sensitivity",
    "structure_scores": "sparity.static.structure.functions",
    "sweep": "sparity.pipeline.studies.sweeping",
    "tune": "sparity.pipeline.studies.tuning.study",
    "with_activations": "sparity.dynamic.activations.functions",
    "with_attention_blocks": "sparity.dynamic.attention.attaching",
}
__all__ = [
    "Recipe",
    "Result",
    "SparityError",
    "activation_mask",
    "attach",
    "attached",
    "attention_blocks",
    "cache",
    "cache_budgets",
    "calibrate_attention",
    "calibrate_cache",
    "cut",
    "fit_activations",
    "load",
    "load_offloaded",
    "offload",
    "perplexity",
    "plan_shape",
    "prune_weight",
    "quantize_cache",
    "quantize_weight",
    "register",
    "restructure",
    "run",
    "score_cache",
    "select_cache",
    "sensitivity",
    "structure_scores",
    "sweep",
    "tune",
    "with_activations",
    "with_attention_blocks",
]

if TYPE_CHECKING:
    from sparity.dynamic.activations.functions import activation_mask, fit_activations, with_activations
    from sparity.dynamic.attention.attaching import with_attention_blocks
    from sparity.dynamic.attention.calibrating import calibrate_attention
    from sparity.dynamic.attention.functions import attention_blocks
    from sparity.dynamic.cache.attaching import cache
    from sparity.dynamic.cache.budgets import cache_budgets
    from sparity.dynamic.cache.calibrating import calibrate_cache
    from sparity.dynamic.cache.functions import score_cache, select_cache
    from sparity.dynamic.cache.quantised import quantize_cache
    from sparity.dynamic.offload.loading import load_offloaded
    from sparity.dynamic.offload.writing import offload
    from sparity.engine.attach import attach, attached
    from sparity.errors import SparityError
    from sparity.models.loading import load
    from sparity.pipeline.run.runner import Result, run
    from sparity.pipeline.studies.sensitivity import sensitivity
    from sparity.pipeline.studies.shapes.study import plan_shape
    from sparity.pipeline.studies.sweeping import sweep
    from sparity.pipeline.studies.tuning.study import tune
    from sparity.quality.perplexity import perplexity
    from sparity.recipe import Recipe
    from sparity.registry import register
    from sparity.static.prune.prune_weight import prune_weight
    from sparity.static.quantize.quantize_weight import quantize_weight
    from sparity.static.structure.functions import cut, restructure, structure_scores


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparity' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # also outranks a submodule of the same name that the import bound
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


class _WhenImported(MetaPathFinder):
    """Lets transformers read packed checkpoints, as soon as its quantizers are imported and not before."""

    QUANTIZERS = "transformers.quantizers.auto"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def execute(module: Any) -> None:
                run(module)
                import_module("sparity.integrations.huggingface")

            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


if _WhenImported.QUANTIZERS in sys.modules:
    import_module("sparity.integrations.huggingface")
elif not any(type(finder).__name__ == "_WhenImported" for finder in sys.meta_path):
    sys.meta_path.insert(0, _WhenImported())
