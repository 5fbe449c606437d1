"""Runs of stages that a test registers: what the pipeline does for any stage."""

from typing import ClassVar

import pytest
import torch
from test_passes import FIRST, SECOND, recipe
from torch import nn

import sparity
from interruptions import Killed, dies_at, weight_files
from sparity import registry
from sparity.errors import NumericalError, SparityError
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.verify import verify
from sparity.sections import Number
from sparity.stages import BlockEdit, BlockStage, ModelStage, Needs
from sparity.stages.base import Estimate


@pytest.fixture
def stages():
    """Register stages for one test."""
    added = []

    def add(name, cls):
        registry.register("stage", name)(cls)
        added.append(name)

    yield add
    for name in added:
        del registry._registered["stage", name]


class Reviver(BlockStage):
    """Says that it keeps zeros, and does not."""

    preserves: ClassVar = frozenset({"mask", "shapes"})
    words: ClassVar = "revive"

    def needs(self):
        return Needs()

    def edit(self, model, evidence, decision):
        projection = evidence.block.projections[2]
        projection.write(torch.ones_like(projection.weight))
        return BlockEdit(evidence.block, ())

    def estimate(self, model, decision, work):
        return Estimate()


def test_a_zero_that_comes_back_stops_the_run_with_the_projections_name(
    stages, token_files, tiny_llama_folder, tmp_path
):
    stages("revive", Reviver)
    chosen = recipe(token_files, tiny_llama_folder, FIRST, {"revive": {}})
    with pytest.raises(
        NumericalError, match=r"model\.layers\.0\.self_attn\.v_proj: revive says that it keeps zeros, but"
    ):
        sparity.run(chosen, output=tmp_path / "out", device="cpu")
    later = recipe(token_files, tiny_llama_folder, FIRST, SECOND, {"revive": {}})  # in the pass after
    with pytest.raises(NumericalError, match="an earlier stage came back"):
        sparity.run(later, output=tmp_path / "later", device="cpu")
    alone = sparity.run(recipe(token_files, tiny_llama_folder, {"revive": {}}), output=tmp_path / "alone", device="cpu")
    assert alone.report.candidates[0].changes == ()  # a run without a pruned projection is a normal run


class Descend(ModelStage):
    """Some steps of gradient descent on the calibration loss, zeros kept."""

    preserves: ClassVar = frozenset({"mask", "shapes"})
    words: ClassVar = "descend"
    rate: Number = 0.1
    steps: int = 4
    keep: bool = True

    def needs(self):
        return Needs(trials=1)

    def estimate(self, model, decision, work):
        return Estimate()

    def train(self, model, masks, tokens, work):
        parameters = {
            f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        begun, kept = work.last() or (0, {})
        for name, tensor in kept.items():
            parameters[name].data.copy_(tensor)
        for step in range(begun, self.steps):
            for parameter in parameters.values():
                parameter.requires_grad_().grad = None
            model(input_ids=tokens, labels=tokens).loss.backward()
            for name, parameter in parameters.items():
                step_of = parameter.grad * masks.get(name.removesuffix(".weight"), 1) if self.keep else parameter.grad
                parameter.data -= self.rate * step_of
                parameter.requires_grad_(False)
            work.save(step + 1, {name: parameter.data for name, parameter in parameters.items()})
            work.progress(step + 1, self.steps)


def test_a_stage_that_trains_the_whole_model(stages, token_files, tiny_llama_folder, tmp_path):
    stages("descend", Descend)
    pruned = {"prune": {"score": "wanda"}}
    chosen = recipe(token_files, tiny_llama_folder, pruned, {"descend": {}})
    assert [planned.words for planned in prepare(chosen, device="cpu").passes] == ["prune", "descend"]
    result = sparity.run(chosen, output=tmp_path / "out", device="cpu")
    before = sparity.run(
        recipe(token_files, tiny_llama_folder, pruned), output=tmp_path / "pruned", device="cpu"
    ).model()
    tokens = prepare(chosen, device="cpu").tokens
    model, changed = result.model(), 0
    for name, weight in model.state_dict().items():
        old = before.state_dict()[name]
        changed += int(not torch.equal(old, weight))
        assert (weight[old == 0] == 0).all()
    assert changed >= 21
    with torch.no_grad():
        assert model(tokens, labels=tokens).loss < before(tokens, labels=tokens).loss
    assert verify(result.path).problems == ()
    for count in (12, 14, 17, 20):  # while it trains, and while it is written
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
            with pytest.raises(Killed):
                sparity.run(chosen, output=tmp_path / str(count), device="cpu")
        resumed = sparity.run(chosen, output=tmp_path / str(count), device="cpu", resume=True)
        assert weight_files(resumed.path) == weight_files(result.path)
    forgets = recipe(token_files, tiny_llama_folder, pruned, {"descend": {"keep": False}})
    with pytest.raises(NumericalError, match="descend says that it keeps zeros, but"):
        sparity.run(forgets, output=tmp_path / "forgets", device="cpu")
    wild = recipe(token_files, tiny_llama_folder, {"descend": {"rate": 1e38}})
    with pytest.raises(SparityError, match="NaN or infinite"):
        sparity.run(wild, output=tmp_path / "wild", device="cpu")
