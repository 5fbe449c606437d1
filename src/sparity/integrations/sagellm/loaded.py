"""A sparse model in memory, and what multiplies its weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparity import registry
from sparity.dynamic.activations.places import places_of
from sparity.engine.attach import attach, declines
from sparity.engine.decoding.model import has_fast_path
from sparity.engine.kernels import native_weight
from sparity.engine.modules.linear import PackedLinear
from sparity.formats import Packed
from sparity.integrations.sagellm import meaning
from sparity.integrations.sagellm.protocol import SparsityConfig
from sparity.models.attached_runtime import attach_in_memory, input_sites
from sparity.models.loading import load

SPARSE_FROM = 1  # of a sequence, the token from which activations are skipped: the first one stays dense


@dataclass(frozen=True)
class SparseModel:
    """A loaded model with what its kernels are bound to.

    Attributes:
        model: of transformers; `generate` and all else are its own.
        path: where it was loaded from.
        kernel: the kernel that the specification names for this machine.
        layouts: how many matrices of the blocks are held in each format; "dense" counts those that are not packed.
        runs: what multiplies them here, in words.
        threshold: of the activations that are skipped; None when none are.
    """

    model: Any = field(repr=False)
    path: str
    kernel: str
    layouts: Mapping[str, int]
    runs: str
    threshold: float | None = None


def load_bound(path: str, config: SparsityConfig, kernel: str, layout: str | Mapping[str, Any] | None) -> SparseModel:
    """Load a model from `path` and put it on the engine, its weights held in `layout`; None is the configuration's.

    Raises:
        SparityError: see `load` and `attach`.
    """
    model = load(path)
    threshold = config.dynamic_threshold if meaning.is_dynamic(config) else None
    if threshold is not None:
        kind: Any = registry.get("stage", "activations")
        stage = kind.model_validate({"method": "teal", "sites": "all", "first": SPARSE_FROM})
        attach_in_memory(model, stage, thresholds(model, threshold))
    reason = declines(model)
    if reason is None:
        model = attach(model, meaning.layout(config) if layout is None else layout)
    layouts, said = _bound(model)
    runs = f"the model's own products: {reason}" if reason else said
    return SparseModel(model, str(path), kernel, layouts, runs, threshold)


def thresholds(model: Any, threshold: float) -> dict[str, Tensor]:
    """One threshold for the inputs of all projections, as the stage `activations` stores what it fits."""
    places = places_of(model, input_sites(model), "all")
    return {f"{place.name}.threshold": torch.tensor(threshold, dtype=torch.float32) for place in places}


def _bound(model: Any) -> tuple[dict[str, int], str]:
    """Formats of the projections' matrices, and what multiplies them."""
    layers = {id(each.module): each.module for site in input_sites(model) for each in site.projections}
    packed = [layer.packed for layer in layers.values() if isinstance(layer, PackedLinear)]
    counts = Counter(matrix.format for matrix in packed)
    counts["dense"] += len(layers) - len(packed)
    path = "decoding on the engine's fast path" if has_fast_path(model) else "decoding by transformers' own code"
    return {name: count for name, count in counts.items() if count}, "; ".join((_products(packed), path))


def _products(packed: Sequence[Packed]) -> str:
    if not packed:
        return "dense products"
    reasons = sorted({reason for matrix in packed if (reason := native_weight.declines(matrix))})
    return f"unpacked for every product, which is slow ({'; '.join(reasons)})" if reasons else "compiled kernels"
