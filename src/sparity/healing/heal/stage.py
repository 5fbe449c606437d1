"""Heal: a sparse model is brought nearer to the dense one, and kept where held-out text says that it is."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from sparity import registry
from sparity.checkpoints.recorded_scales import SCALES
from sparity.errors import InvalidInput
from sparity.healing.heal import guard
from sparity.healing.heal.low_rank import added
from sparity.healing.heal.methods.base import Method, Task
from sparity.models import Decoder, InputSite
from sparity.models import transformers as hf
from sparity.models.attached_runtime import input_sites
from sparity.models.loading import load_plain, load_tokenizer
from sparity.registry import register
from sparity.sections import Spec
from sparity.stages import Decision, ModelStage, Needs, Trained
from sparity.stages.base import Estimate, Property, Workload
from sparity.stages.kinds import Workspace
from sparity.training.fine_tune.options import same_shapes

WEIGHTS: frozenset[Property] = frozenset({"mask", "shapes", "tokens"})


@register("stage", "heal")
class HealStage(ModelStage):
    """Bring a sparse model nearer to the dense one by a method of `heal.method`; every zero stays.

    The whole model and the dense one are in memory. The last fourth of the calibration sequences judges: a healing that
    does not lower KL(dense || model) there is put back.
    """

    keeps_zeros: ClassVar[bool] = True

    method: Spec = Field("least_squares", description="how; `sparity methods` lists all")
    teacher: str | None = Field(
        None, description="the dense model, a folder or name; default: the model that the recipe begins with"
    )
    guard: bool = Field(True, description="on: kept only where held-out text is nearer to the dense model; off: always")

    @property
    def preserves(self) -> frozenset[Property]:  # type: ignore[override]
        """What is added beside the weights leaves all there is."""
        return WEIGHTS | {"values"} if self._built().adds else WEIGHTS

    @property
    def relies_on(self) -> frozenset[Property]:
        """What is added was fitted to these weights."""
        return frozenset({"mask", "shapes", "values"}) if self._built().adds else frozenset()

    @property
    def rewrites(self) -> bool:  # type: ignore[override]
        """What is added beside a matrix would be added twice by another that compares."""
        return self._built().adds

    @property
    def compares(self) -> bool:
        """See `Stage.compares`."""
        return self._built().compares

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        return f"heal: {self._built().words}"

    @property
    def how(self) -> str:
        """See `Stage.how`."""
        return self._built().name

    def needs(self) -> Needs:
        """See `Stage.needs`: the calibration text itself."""
        return Needs(text=True)

    def reads(self) -> Mapping[str, str]:
        """See `Stage.reads`: the teacher's files."""
        if self.teacher is None:
            return {}
        folder = hf.locate(self.teacher)
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
        return {f"teacher.{path.name}": str(path) for path in files if path.is_file()}

    def decide(self, model: Decoder, evidence: object) -> Decision:
        """The method's name; a run adds what the guard measured: `{"method", "kl_before", "kl_after", "kept"}`.

        Raises:
            InvalidInput: the method cannot heal the model, or the teacher speaks of other tokens.
        """
        built = self._built()
        if reason := built.declines(model):
            raise InvalidInput(f"heal ({built.name}): {reason}")
        folder = getattr(model.source, "folder", None)
        if folder is not None and not built.adds and (folder / SCALES).is_dir():
            raise InvalidInput(
                f"heal: the weights of {folder} are values of a grid, whose scales lie beside them, and {built.name} "
                "would move them off it: use eora, which adds to them, or put heal before quantize in one recipe"
            )
        if self.teacher is not None:
            _check_tokens(hf.read_config(hf.locate(self.teacher)), model.config)
            _check_tokenizers(hf.locate(self.teacher), folder or _home(model))
        return {"method": built.name}

    def config_changes(self, model: Decoder) -> Mapping[str, Any]:
        """See `ModelStage.config_changes`."""
        return self._built().config_changes(model)

    def after(self, model: Decoder, decision: Decision) -> Decoder:
        """See `Stage.after`."""
        changes = self.config_changes(model)
        return model.outlined(changes) if changes else model

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        return replace(self._built().estimate(model, work), changes=tuple(same_shapes(self.name, model)))

    def train(self, model: nn.Module, masks: Mapping[str, Tensor], tokens: Tensor, work: Workspace) -> Trained:
        """See `ModelStage.train`."""
        built = self._built()
        model = built.prepared(model)
        learned, judging = guard.places_apart(tokens) if self.guard else (list(range(len(tokens))), [])
        load = work.dense if self.teacher is None else partial(_load, self.teacher, model)
        blocks, dense = self._blocks(model, work), partial(_checked, load, model)
        task, held = Task(model, masks, tokens[learned], blocks, work, dense, learned), tokens[judging]
        if not self.guard:
            healed = built.heal(task)
            return Trained(healed.curves, healed.notes, {"kept": True}, healed.runtime)
        before, was = guard.divergence(task.dense, model, held), guard.snapshot(model)
        if before == 0:
            note = f"heal ({built.name}): the model predicts what the dense one does, there is nothing to heal."
            return Trained(notes=(note,), found={"kl_before": 0.0, "kl_after": 0.0, "kept": False})
        healed = built.heal(task)
        with added(input_sites(model), healed.runtime):
            after = guard.divergence(task.dense, model, held)
        kept = after < before
        if not kept:
            guard.put_back(model, was)
        note = (
            f"heal ({built.name}): KL to the dense model on {len(held)} held-out sequences {before:.4f} before, "
            f"{after:.4f} after: {'kept' if kept else 'put back, since it harms (`guard: off` keeps it)'}."
        )
        found = {"kl_before": before, "kl_after": after, "kept": kept}
        return Trained(healed.curves, (*healed.notes, note), found, healed.runtime if kept else {})

    def attach(
        self, module: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """See `RuntimeStage.attach`."""
        return added(sites, data)

    def _blocks(self, model: Any, work: Workspace) -> Sequence[int]:
        """Which of the teacher's blocks each block was; nothing where that is not known."""
        count = model.config.num_hidden_layers
        if self.teacher is None or list(work.blocks) != list(range(count)):
            return work.blocks
        return work.blocks if hf.read_config(hf.locate(self.teacher)).num_hidden_layers == count else ()

    def _built(self) -> Method:
        built: Method = registry.build("heal.method", self.method)
        return built


def _home(model: Decoder) -> Path | None:
    """The folder that a model of shapes only was made from."""
    named = getattr(model.config, "_name_or_path", "")
    return Path(named) if named and Path(named).is_dir() else None


def _load(teacher: str, model: nn.Module) -> nn.Module:
    parameter = next(model.parameters())
    loaded: nn.Module = load_plain(teacher, str(parameter.device), parameter.dtype)
    return loaded


def _checked(load: Callable[[], Any], model: Any) -> nn.Module:
    dense = load()
    _check_tokens(dense.config, model.config)
    found: nn.Module = dense
    return found


def _check_tokens(teacher: Any, config: Any) -> None:
    if teacher.vocab_size != config.vocab_size:
        raise InvalidInput(
            f"heal: the teacher knows {teacher.vocab_size:,} tokens and the model {config.vocab_size:,}: it must be "
            "one with the same tokenizer"
        )


def _check_tokenizers(teacher: Path, folder: Path | None) -> None:
    """Two tokenizers must give the same tokens the same numbers; without one on either side nothing is known."""
    theirs, ours = load_tokenizer(teacher), None if folder is None else load_tokenizer(folder)
    if theirs is not None and ours is not None and theirs.get_vocab() != ours.get_vocab():
        raise InvalidInput(
            f"heal: {teacher} has another tokenizer than the model, so that their predictions are of different tokens: "
            "the teacher must be a model with the same one"
        )
