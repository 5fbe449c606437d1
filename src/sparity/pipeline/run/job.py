"""A recipe made ready: everything is opened and checked before any work begins."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparity import registry
from sparity.budgets.base import Budget
from sparity.calibration.gradients import check_length
from sparity.calibration.statistics import GRADIENTS, REGIONAL
from sparity.calibration.tokens import token_hash
from sparity.checkpoints.source import CheckpointSource
from sparity.errors import InvalidInput
from sparity.files import expand, file_hash
from sparity.measure.data.machine import package_version
from sparity.measure.timing.generation import check_context
from sparity.models import Decoder
from sparity.models import transformers as hf
from sparity.models.loading import load, load_tokenizer
from sparity.pipeline.evidence.targets import decide_targets
from sparity.pipeline.run.tokens import MeasuredText, calibration_tokens, default_device, measured_texts
from sparity.recipe import Prune, Recipe, SpeedTest
from sparity.static.prune.pruning import Pruning


@dataclass(frozen=True)
class Job:
    """A checked recipe with its model opened, its tokens drawn and every projection's sparsity decided.

    When the budget rests on data, `targets` holds the mean until the run has measured it.
    """

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
    def budget(self) -> Budget:
        """The recipe's budget."""
        budget: Budget = registry.build("budget", self.prune.budget)
        return budget

    @property
    def needs(self) -> frozenset[str]:
        """The statistics of inputs to gather on the walk."""
        needs = self.pruning.needs | (frozenset({"gram"}) if self.recipe.measure.layer_loss else frozenset())
        return needs - self.gradients - {REGIONAL}

    @property
    def gradients(self) -> frozenset[str]:
        """The gradient statistics to gather before the walk, from the dense model whatever the order."""
        return self.pruning.needs & frozenset(GRADIENTS)

    @property
    def prunes_from_store(self) -> bool:
        """Whether the pruning reads statistics of the dense model from a store, without a forward pass of its own."""
        return self.prune.order == "independent" and bool(self.stored_needs)

    @property
    def stored_needs(self) -> frozenset[str]:
        """The statistics of the dense model to keep on disk: for other runs, or because this one reads them twice."""
        found = self.pruning.dense_needs | (self.pruning.needs if self.budget.measures else frozenset())
        if found and self.prune.order == "independent":
            found |= self.needs | self.gradients | self.regional
        if self.recipe.calibration is not None and self.recipe.calibration.store is not None:
            found |= frozenset(self.budget.needs)
            if self.prune.order == "independent":
                found |= self.needs | self.gradients | self.regional
        return with_small(found)

    @property
    def regional(self) -> frozenset[str]:
        """The gradient statistics of single blocks, gathered when the block is reached."""
        return self.pruning.needs & {REGIONAL}

    @property
    def measured_on(self) -> str:
        """Where both models are measured: packed weights are multiplied on the CPU."""
        packed = isinstance(self.decoder.source, CheckpointSource) and self.decoder.source.packed
        return "cpu" if packed or self.recipe.output.format == "packed" else self.device

    def dense_model(self) -> Any:
        """The dense model, ready to be measured."""
        if self.folder is None:
            return self.module
        return load(self.folder, device=self.measured_on, dtype=self.decoder.dtype)

    def identity(self) -> dict[str, Any]:
        """What a run folder must agree with before it is continued."""
        return {
            "recipe": self.recipe.identity(),
            "model": self.decoder.source.fingerprint(),
            "dtype": str(self.decoder.dtype),
            "device": self.device,
            "tokens": token_hash(self.tokens) if self.tokens is not None else None,
            "table": file_hash(expand(table)) if (table := getattr(self.budget, "table", None)) else None,
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
    recipe = _with_fitting_speed_test(recipe, hf.context_length(decoder.config))
    targets = decide_targets(recipe.stages[0].prune, pruning, decoder)
    module = chosen if isinstance(chosen, nn.Module) else None
    folder = None if module is not None else hf.locate(chosen)
    name = str(chosen) if module is None else type(module).__name__
    tokenizer = load_tokenizer(folder) if folder is not None else None
    tokens = _tokens(recipe, pruning, tokenizer, decoder.config)
    texts = tuple(measured_texts(recipe.measure, tokenizer, decoder.skeleton))
    if test := recipe.measure.speed:
        check_context("measure.speed", decoder.config, test.prompt, test.tokens)
    job = Job(recipe, decoder, pruning, targets, tokens, texts, device, name, folder, module)
    _check_store(job)
    return job


def with_small(needs: frozenset[str]) -> frozenset[str]:
    """What a store of these statistics holds: the small ones cost nothing, and other methods may want them."""
    return needs | {"mean", "column_norm"} if needs else needs


def _check_store(job: Job) -> None:
    calibration = job.recipe.calibration
    if calibration is not None and calibration.store is not None and job.needs and not job.stored_needs:
        raise InvalidInput(
            "calibration.store keeps statistics of the dense model, which `order: sequential` does not read: set "
            "`order: independent`, or leave the store out"
        )


def _pruning_arguments(prune: Prune) -> dict[str, Any]:
    return {key: getattr(prune, key) for key in ("score", "pattern", "solver", "sparsity", "compare_within")}


def _tokens(recipe: Recipe, pruning: Pruning, tokenizer: Any, config: Any) -> Tensor | None:
    budget: Budget = registry.build("budget", recipe.stages[0].prune.budget)
    needs = pruning.needs | pruning.dense_needs | set(budget.needs)
    if not needs and not budget.measures and not recipe.measure.layer_loss:
        return None
    if recipe.calibration is None:
        raise InvalidInput(
            f"{pruning.words}, budget {budget.name} needs calibration text: add "
            "`calibration: {text: FILE}` (for a first try, python-docs:calibration), or choose the score magnitude"
        )
    tokens = calibration_tokens(recipe.calibration, tokenizer, config)
    if (pruning.needs | pruning.dense_needs) & set(GRADIENTS):
        check_length(tokens)
    return tokens


def _with_fitting_speed_test(recipe: Recipe, context: int | None) -> Recipe:
    """The recipe with a default speed test that fits a short context; one that was asked for stays as it is."""
    speed = SpeedTest.fitting(context)
    if "speed" in recipe.measure.model_fields_set or speed == recipe.measure.speed:
        return recipe
    return recipe.model_copy(update={"measure": recipe.measure.model_copy(update={"speed": speed})})
