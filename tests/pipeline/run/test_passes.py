"""Several passes: cut where they must be, resumed, kept, reused, freed, refused when damaged or foreign."""

import json
import shutil
from typing import ClassVar

import pytest
import torch
from torch import nn

import sparity
from interruptions import Killed, contents, dies_at, weight_files
from sparity import registry
from sparity.errors import CorruptFile, NumericalError, RunConflict, SparityError
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe
from sparity.sections import Number
from sparity.stages import BlockEdit, BlockStage, ModelStage, Needs
from sparity.stages.base import Estimate
from sparity.stages.order import passes
from sparity.static.prune.pruning import Pruning

FIRST = {"prune": {"score": "magnitude", "sparsity": 0.3}}
SECOND = {"prune": {"score": "wanda", "sparsity": 0.5, "budget": "owl"}}  # reads the model that its pass opens


def recipe(token_files, folder, *stages, **sections):
    return Recipe.read(
        {
            "model": str(folder),
            "calibration": {"tokens": token_files["calibration"], "batch": 3},
            "stages": list(stages),
            "measure": {"speed": None},
            **sections,
        }
    )


@pytest.fixture
def counted(monkeypatch):
    """How many projections were pruned."""
    applied = []
    apply = Pruning.apply
    monkeypatch.setattr(Pruning, "apply", lambda self, *a: applied.append(self.words) or apply(self, *a))
    return applied


def cut(*stages, layer_loss=False):
    """The places of the stages, pass by pass."""
    checked = Recipe.read({"stages": list(stages)}).stages
    return [[sequel.first + place for place in range(len(sequel.stages))] for sequel in passes(checked, layer_loss)]


def test_where_a_new_pass_begins():
    wanda = {"prune": {"score": "wanda"}}
    assert cut(wanda, wanda, FIRST) == [[0, 1, 2]]  # each sees what the ones before it left in the block
    assert cut(wanda, SECOND, wanda) == [[0], [1, 2]]
    independent = {"prune": {"score": "wanda", "order": "independent"}}
    assert cut(wanda, independent) == [[0], [1]]
    assert cut(independent, wanda) == [[0], [1]]
    assert cut(independent, FIRST) == [[0, 1]]  # magnitude reads nothing
    assert cut(independent, FIRST, layer_loss=True) == [[0], [1]]
    assert cut(FIRST, {"prune": {"score": "taylor"}}) == [[0], [1]]
    assert cut(FIRST, {"prune": {"score": "wanda", "budget": "greedy"}}) == [[0], [1]]


def test_two_passes_are_two_runs_one_after_the_other(token_files, tiny_llama_folder, tmp_path):
    both = sparity.run(recipe(token_files, tiny_llama_folder, FIRST, SECOND), output=tmp_path / "both", device="cpu")
    one = sparity.run(recipe(token_files, tiny_llama_folder, FIRST), output=tmp_path / "one", device="cpu")
    two = sparity.run(recipe(token_files, one.path, SECOND), output=tmp_path / "two", device="cpu")
    assert weight_files(both.path) == weight_files(two.path)
    assert {path.name for path in both.path.iterdir()} == {path.name for path in two.path.iterdir()}
    changes = both.report.candidates[0].changes
    assert next(change.target for change in changes if change.name.endswith("0.mlp.up_proj")) == 0.3
    assert len(changes) == 2 * 21
    assert verify(both.path).problems == ()


def test_stages_of_one_pass_see_each_others_edits(token_files, tiny_llama_folder, tmp_path):
    """The second prunes what the first left, and zeros count among those that it removes."""
    solved = {"prune": {"solver": "sparsegpt", "sparsity": 0.5}}
    found = sparity.run(recipe(token_files, tiny_llama_folder, FIRST, solved), output=tmp_path / "out", device="cpu")
    first = sparity.run(recipe(token_files, tiny_llama_folder, FIRST), output=tmp_path / "first", device="cpu")
    before, after = first.model().state_dict(), found.model().state_dict()
    for change in found.report.candidates[0].totals.outcomes:
        name = f"{change.name}.weight"
        assert (after[name][before[name] == 0] == 0).all(), name
        assert change.zeros == pytest.approx(0.5, abs=0.02)


def test_killed_anywhere_in_two_passes(token_files, tiny_llama_folder, tmp_path):
    chosen = recipe(token_files, tiny_llama_folder, FIRST, SECOND)
    whole = sparity.run(chosen, output=tmp_path / "whole", device="cpu").path
    died = 0
    for count in range(1, 100):
        output = tmp_path / f"killed-{count}"
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
            try:
                sparity.run(chosen, output=output, device="cpu")
                break
            except Killed:
                died += 1
        resumed = sparity.run(chosen, output=output, resume=True, device="cpu")
        assert weight_files(resumed.path) == weight_files(whole)
        assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in whole.iterdir())
        shutil.rmtree(output)
    assert died >= 2 * (1 + 3 * 2 + 2) + 4


def stop_in_second_pass(chosen, output, resume=False):
    """A run that was killed after the first pass was finished."""
    from sparity.pipeline.run.pass_folder import PassFolder
    from sparity.pipeline.run.run_folder import RunFolder

    commit = PassFolder.commit

    def stop(self, blocks, hidden, record):
        commit(self, blocks, hidden, record)
        if isinstance(self, RunFolder) and self.output == output and blocks == 1:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassFolder, "commit", stop)
        with pytest.raises(Killed):
            sparity.run(chosen, output=output, device="cpu", resume=resume)


def test_a_recipe_that_changed_in_a_later_stage_starts_there(token_files, tiny_llama_folder, tmp_path, counted):
    output = tmp_path / "out"
    stop_in_second_pass(recipe(token_files, tiny_llama_folder, FIRST, SECOND), output)
    counted.clear()
    other = {"prune": {**SECOND["prune"], "sparsity": 0.6}}
    changed = recipe(token_files, tiny_llama_folder, FIRST, other)
    resumed = sparity.run(changed, output=output, resume=True, device="cpu")
    assert counted == ["wanda, 60%, unstructured"] * 21
    fresh = sparity.run(changed, output=tmp_path / "fresh", device="cpu")
    assert weight_files(resumed.path) == weight_files(fresh.path)


def test_a_recipe_that_changed_in_the_first_stage_is_another_run(token_files, tiny_llama_folder, tmp_path):
    output = tmp_path / "out"
    stop_in_second_pass(recipe(token_files, tiny_llama_folder, FIRST, SECOND), output)
    before = contents(tmp_path / "out.partial")
    other = {"prune": {**FIRST["prune"], "sparsity": 0.2}}
    with pytest.raises(RunConflict, match=r"different: recipe\.stages\): choose another output, or start over"):
        sparity.run(recipe(token_files, tiny_llama_folder, other, SECOND), output=output, resume=True, device="cpu")
    assert contents(tmp_path / "out.partial") == before


def test_kept_passes_serve_later_runs(token_files, tiny_llama_folder, tmp_path, counted):
    output = tmp_path / "out"
    chosen = recipe(token_files, tiny_llama_folder, FIRST, SECOND)
    kept = sparity.run(chosen, output=output, device="cpu", keep_passes=True)
    (place,) = (tmp_path / "out.passes").iterdir()
    assert place.name.startswith("pass-1-")
    assert sparity.load(place) is not None  # an ordinary checkpoint
    weights = weight_files(kept.path)
    counted.clear()
    again = sparity.run(chosen, output=output, device="cpu", force=True)
    assert counted == ["wanda, 50%, unstructured"] * 21
    assert weight_files(again.path) == weights
    sparity.run(recipe(token_files, tiny_llama_folder, {"prune": {**FIRST["prune"], "sparsity": 0.1}}, SECOND),
                output=output, device="cpu", force=True, keep_passes=True)  # fmt: skip
    assert len(list((tmp_path / "out.passes").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda place: (place / "model-00002-of-00004.safetensors").unlink(), CorruptFile, "is missing or was altered"),
        (lambda place: (place / "config.json").write_text("{}"), CorruptFile, "config.json is missing or was altered"),
        (lambda place: (place / "pass.json").write_text("{"), CorruptFile, "is not JSON"),
        (lambda place: edit(place, key="0"), RunConflict, "holds a pass of another recipe or model: delete"),
        (lambda place: edit(place, files=[1]), CorruptFile, "is damaged: delete"),
        (lambda place: edit(place, done={}), CorruptFile, "is damaged"),
        (lambda place: edit(place, files={"../../x": "0"}), CorruptFile, "is missing or was altered"),
    ],
)
def test_a_damaged_or_foreign_pass_is_refused(token_files, tiny_llama_folder, tmp_path, change, error, words):
    chosen = recipe(token_files, tiny_llama_folder, FIRST, SECOND)
    sparity.run(chosen, output=tmp_path / "out", device="cpu", keep_passes=True)
    (place,) = (tmp_path / "out.passes").iterdir()
    change(place)
    with pytest.raises(error, match=words):
        sparity.run(chosen, output=tmp_path / "out", device="cpu", force=True)
    assert verify(tmp_path / "out").problems == ()  # the old result is still there
    shutil.rmtree(place)
    sparity.run(chosen, output=tmp_path / "out", device="cpu", force=True)


def edit(place, **entries):
    path = place / "pass.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_finished_pass_frees_the_one_before(token_files, tiny_llama_folder, tmp_path):
    third = {"prune": {"score": "ria", "sparsity": 0.6, "budget": "owl"}}
    output = tmp_path / "out"
    stop_in_second_pass(recipe(token_files, tiny_llama_folder, FIRST, SECOND, third), output)
    assert [path.name[:6] for path in (tmp_path / "out.partial" / ".sparity" / "passes").iterdir()] == ["pass-2"]


# ---- stages of a test


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
