"""A recipe made ready: everything is opened and checked before any work begins."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparity import registry
from sparity.budgets.base import allocate
from sparity.calibration.tokens import token_hash
from sparity.errors import InvalidInput
from sparity.measure.machine import package_version
from sparity.models import Decoder, Projection
from sparity.models import transformers as hf
from sparity.models.loading import load, load_tokenizer
from sparity.pipeline.texts import MeasuredText, calibration_tokens, default_device, measured_texts
from sparity.recipe import Prune, Recipe, SpeedTest
from sparity.static.pruning import Pruning


@dataclass(frozen=True)
class Job:
    """A checked recipe with its model opened, its tokens drawn and every projection's sparsity decided."""

    recipe: Recipe
    decoder: Decoder
    pruning: Pruning
    targets: dict[str, float]  # projection -> fraction to remove
    tokens: Tensor | None  # [samples, length]
    texts: tuple[MeasuredText, ...]
    device: str
    name: str
    folder: Path | None  # of the dense model, when it lies on disk
    module: nn.Module | None = field(repr=False, default=None)  # the dense model, when it was given in memory

    @property
    def prune(self) -> Prune:
        """The recipe's prune stage."""
        return self.recipe.stages[0].prune

    @property
    def needs(self) -> frozenset[str]:
        """The statistics to gather."""
        return self.pruning.needs | (frozenset({"gram"}) if self.recipe.measure.layer_loss else frozenset())

    def dense_model(self) -> Any:
        """The dense model, ready to be measured."""
        if self.folder is None:
            return self.module
        return load(self.folder, device=self.device, dtype=self.decoder.dtype)

    def identity(self) -> dict[str, Any]:
        """What a run folder must agree with before it is continued."""
        return {
            "recipe": self.recipe.identity(),
            "model": self.decoder.source.fingerprint(),
            "dtype": str(self.decoder.dtype),
            "device": self.device,
            "tokens": token_hash(self.tokens) if self.tokens is not None else None,
            "versions": {name: package_version(name) for name in ("torch", "transformers")},
        }


def prepare(recipe: Recipe, model: Any = None, device: str = "auto") -> Job:
    """Open the model, draw the tokens and decide the targets.

    Raises:
        SparityError: anything that would make the run fail later and can be known now.
    """
    pruning = Pruning.of(**_pruning_arguments(recipe.stages[0].prune))
    chosen = model if model is not None else recipe.model
    if chosen is None:
        raise InvalidInput("the recipe names no model: set `model:` or pass one")
    device = default_device(device)
    decoder = Decoder.open(chosen, device, recipe.dtype)
    projections = [p for index in range(len(decoder)) for site in decoder.sites(index) for p in site.projections]
    targets = _targets(recipe.stages[0].prune, pruning, projections)
    module = chosen if isinstance(chosen, nn.Module) else None
    folder = None if module is not None else hf.locate(chosen)
    name = str(chosen) if module is None else type(module).__name__
    tokenizer = load_tokenizer(folder) if folder is not None else None
    tokens = _tokens(recipe, pruning, tokenizer, decoder.config)
    texts = tuple(measured_texts(recipe.measure, tokenizer, decoder.skeleton))
    _check_speed(recipe.measure.speed, decoder.config)
    return Job(recipe, decoder, pruning, targets, tokens, texts, device, name, folder, module)


def _pruning_arguments(prune: Prune) -> dict[str, Any]:
    return {key: getattr(prune, key) for key in ("score", "pattern", "solver", "sparsity", "compare_within")}


def _targets(prune: Prune, pruning: Pruning, projections: Iterable[Projection]) -> dict[str, float]:
    if prune.true_sequential and prune.order == "independent":
        raise InvalidInput("true_sequential needs `order: sequential`: independent statistics see the dense model only")
    shapes = {projection.name: tuple(projection.weight.shape) for projection in projections}
    cost = {name: float(rows * columns) for name, (rows, columns) in shapes.items()}
    fixed = {**dict.fromkeys(prune.dense, 0.0), **prune.overrides}
    if pruning.pattern.sparsity is None:
        targets = allocate(registry.build("budget", prune.budget), cost, pruning.sparsity, fixed)
    else:
        targets = _fixed_pattern_targets(prune, pruning, cost)
    for name, target in targets.items():
        if target > 0:
            rows, columns = shapes[name]
            pruning.pattern.check_shape(rows, columns, name)
    return targets


def _fixed_pattern_targets(prune: Prune, pruning: Pruning, cost: dict[str, float]) -> dict[str, float]:
    """N:M removes the same share wherever it is applied: projections can only be left dense."""
    uneven = {glob: share for glob, share in prune.overrides.items() if share not in (0, pruning.pattern.sparsity)}
    budget = registry.build("budget", prune.budget)
    if uneven or budget.name != "uniform":
        what = f"overrides {uneven}" if uneven else f"budget {budget.name}"
        raise InvalidInput(
            f"{pruning.pattern.words} removes {pruning.sparsity:.0%} everywhere and cannot follow the {what}; list "
            "projections under `dense:`, or use the unstructured pattern"
        )
    fixed = {**dict.fromkeys(prune.dense, 0.0), **prune.overrides}
    allocate(budget, cost, 0.0, dict.fromkeys(fixed, 0.0))  # every glob must match
    dense = [glob for glob, share in fixed.items() if share == 0]
    named = {name for glob in dense for name in cost if fnmatchcase(name, glob)}
    if len(named) == len(cost):
        raise InvalidInput("every projection is to stay dense: nothing is left to prune")
    return {name: 0.0 if name in named else pruning.sparsity for name in cost}


def _tokens(recipe: Recipe, pruning: Pruning, tokenizer: Any, config: Any) -> Tensor | None:
    if not pruning.needs and not recipe.measure.layer_loss:
        return None
    if recipe.calibration is None:
        raise InvalidInput(
            f"{pruning.words} needs calibration text: add `calibration: {{text: FILE}}` (for a first try, "
            "python-docs:calibration), or choose the score magnitude"
        )
    return calibration_tokens(recipe.calibration, tokenizer, config)


def _check_speed(test: SpeedTest | None, config: Any) -> None:
    context = hf.context_length(config)
    if test and context and test.prompt + test.tokens > context:
        raise InvalidInput(
            f"measure.speed: a prompt of {test.prompt} and {test.tokens} new tokens do not fit the model's context of "
            f"{context} tokens"
        )
