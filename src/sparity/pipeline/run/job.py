"""A recipe made ready: everything is opened and checked before any work begins."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparity.calibration.gradients import check_length
from sparity.calibration.tokens import token_hash
from sparity.checkpoints.companions import companions
from sparity.checkpoints.packed import runtime_of
from sparity.checkpoints.source import CheckpointSource
from sparity.checkpoints.stored_as import check_globs
from sparity.errors import InvalidInput
from sparity.files import expand, file_hash
from sparity.measure.data.machine import package_version
from sparity.measure.timing.generation import check_context
from sparity.measure.timing.memory_fit import working_bytes
from sparity.memory import check_memory
from sparity.models import Decoder
from sparity.models import transformers as hf
from sparity.models.attached_runtime import runtime_attached
from sparity.models.loading import load, load_tokenizer
from sparity.pipeline.evidence.dense_statistics import stored_needs
from sparity.pipeline.evidence.opened import Opened
from sparity.pipeline.run.measured_tasks import check_tasks
from sparity.pipeline.run.planned import PlannedPass, PlannedStage, plan_passes
from sparity.pipeline.run.tokens import MeasuredText, calibration_tokens, default_device, measured_texts
from sparity.recipe import Recipe, SpeedTest
from sparity.stages.order import check_order, needs_of


@dataclass(frozen=True)
class Job:
    """A checked recipe with its model opened, its tokens drawn and its passes planned."""

    recipe: Recipe
    decoder: Decoder
    passes: tuple[PlannedPass, ...]
    tokens: Tensor | None  # [samples, length]
    texts: tuple[MeasuredText, ...]
    device: str
    name: str
    folder: Path | None  # of the dense model, when it lies on disk
    module: nn.Module | None = field(repr=False, default=None)  # the dense model, when it was given in memory
    companions: tuple[str, ...] = ()  # files of the dense model's folder that the result needs too

    @property
    def stages(self) -> tuple[PlannedStage, ...]:
        """The stages of all passes, in the recipe's order."""
        return tuple(stage for planned in self.passes for stage in planned.stages)

    @property
    def words(self) -> str:
        """What is done, such as "wanda, 50 %, unstructured"."""
        return "; ".join(planned.stage.words for planned in self.stages)

    @property
    def batch(self) -> int:
        """Calibration sequences per forward pass."""
        return self.recipe.calibration.batch if self.recipe.calibration else 1

    @property
    def opened(self) -> Opened:
        """The dense model with what it is calibrated on."""
        return Opened(self.decoder, self.tokens, self.batch)

    @property
    def store(self) -> Path | None:
        """The folder that keeps the dense model's statistics for other runs."""
        kept = self.recipe.calibration.store if self.recipe.calibration else None
        return None if kept is None else expand(kept)

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
        return {"recipe": self.recipe.identity(), **_identity(self.recipe, self.decoder, self.device, self.tokens)}


def prepare(recipe: Recipe, model: Any = None, device: str = "auto") -> Job:
    """Open the model, draw the tokens and plan the passes.

    Raises:
        SparityError: anything that would make the run fail later and can be known now.
    """
    check_order(recipe.stages)
    chosen = model if model is not None else recipe.model
    if chosen is None:
        raise InvalidInput("the recipe names no model: set `model:` or pass one")
    _refuse_runtime(chosen)
    device = default_device(device)
    decoder = Decoder.open(chosen, device, recipe.dtype)
    recipe = _with_fitting_speed_test(recipe, hf.context_length(decoder.config))
    check_globs(recipe.output.matrices, decoder.linear_weights())
    loss = recipe.measure.layer_loss
    passes = plan_passes(recipe.stages, decoder, loss)  # refused here, before any text is read
    module = chosen if isinstance(chosen, nn.Module) else None
    folder = None if module is not None else hf.locate(chosen)
    name = str(chosen) if module is None else type(module).__name__
    tokenizer = load_tokenizer(folder) if folder is not None else None
    check_tasks(recipe.measure.tasks, tokenizer)
    tokens = _tokens(recipe, tokenizer, decoder.config)
    texts = tuple(measured_texts(recipe.measure, tokenizer, decoder.skeleton))
    if test := recipe.measure.speed:
        check_context("measure.speed", decoder.config, test.prompt, test.tokens)
        for size in test.batch:
            needed = working_bytes(decoder.config, size, test.prompt, test.tokens)
            check_memory(f"measure.speed.batch: {size:,} sequences at once", needed, "take fewer")
    identity = {
        **_identity(recipe, decoder, device, tokens),
        "calibration": None if recipe.calibration is None else recipe.calibration.batch,
        "layer_loss": loss,
    }
    passes = tuple(planned.keyed(identity) for planned in passes)
    beside = () if folder is None else companions(folder)
    job = Job(recipe, decoder, passes, tokens, texts, device, name, folder, module, beside)
    _check_store(job)
    return job


def _refuse_runtime(model: Any) -> None:
    """Run-time stages of a model are fitted to its weights as they are."""
    if isinstance(model, nn.Module):
        attached = runtime_attached(model)
        entries = attached.entries if attached else ()
    else:
        entries = runtime_of(hf.locate(model))
    if entries:
        named = ", ".join(entry.name for entry in entries)
        raise InvalidInput(
            f"the model has run-time stages ({named}), which were fitted to its weights as they are: put all stages "
            "into one recipe for the model that it was made from, or give the model without them "
            "(model=sparity.load(path, runtime=False))"
        )


def _identity(recipe: Recipe, decoder: Decoder, device: str, tokens: Tensor | None) -> dict[str, Any]:
    read = {
        f"stages.{place}.{key}": file
        for place, stage in enumerate(recipe.stages)
        for key, file in stage.reads().items()
    }
    return {
        "model": decoder.source.fingerprint(),
        "dtype": str(decoder.dtype),
        "device": device,
        "tokens": token_hash(tokens) if tokens is not None else None,
        "files": {key: file_hash(expand(file)) for key, file in read.items()},
        "versions": {name: package_version(name) for name in ("torch", "transformers")},
    }


def _check_store(job: Job) -> None:
    if job.store is None:
        return
    first = needs_of(job.stages[0].stage, job.recipe.measure.layer_loss)
    if first.statistics and not stored_needs(first, asked=True):
        raise InvalidInput(
            "calibration.store keeps statistics of the dense model, which `order: sequential` does not read: set "
            "`order: independent`, or leave the store out"
        )


def _tokens(recipe: Recipe, tokenizer: Any, config: Any) -> Tensor | None:
    reading = [stage for stage in recipe.stages if needs_of(stage, recipe.measure.layer_loss).calibration]
    if not reading:
        return None
    if recipe.calibration is None:
        needs = needs_of(reading[0], recipe.measure.layer_loss)
        wanted = ", ".join(sorted(needs.statistics | needs.gradients | needs.decision)) or "what it measures"
        raise InvalidInput(
            f"the stage {reading[0].name} ({reading[0].words}) needs calibration text for {wanted}: add "
            "`calibration: {text: FILE}` (for a first try, python-docs:calibration), or choose what needs none, such "
            "as the score magnitude with the budget uniform"
        )
    tokens = calibration_tokens(recipe.calibration, tokenizer, config)
    if any(stage.needs().gradients for stage in reading):
        check_length(tokens)
    return tokens


def _with_fitting_speed_test(recipe: Recipe, context: int | None) -> Recipe:
    """The recipe with a default speed test that fits a short context; one that was asked for stays as it is."""
    speed = SpeedTest.fitting(context)
    if "speed" in recipe.measure.model_fields_set or speed == recipe.measure.speed:
        return recipe
    return recipe.model_copy(update={"measure": recipe.measure.model_copy(update={"speed": speed})})
