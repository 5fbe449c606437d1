"""Several passes: cut where they must be, resumed, kept, reused, freed, refused when damaged or foreign."""

import json
import shutil

import pytest

import sparity
from interruptions import Killed, contents, dies_at, weight_files
from sparity.errors import CorruptFile, RunConflict
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe
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
