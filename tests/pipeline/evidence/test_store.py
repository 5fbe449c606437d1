"""Statistics that are kept: no forward pass the second time, the same result, and nothing foreign is ever read."""

import json

import numpy as np
import pytest
import torch

import sparity
from interruptions import Killed, contents, dies_at, weight_files
from sparity.calibration.store import StatisticsStore, store_bytes
from sparity.errors import CorruptFile, InvalidInput, RunConflict
from sparity.models import Block, Decoder
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import plan
from sparity.recipe import Recipe


@pytest.fixture
def run(token_files, tiny_llama_folder, tmp_path):
    """Run a prune section with a store (or without), by default in the independent order."""

    def execute(prune, output, store=tmp_path / "store", **arguments):
        calibration = {"tokens": token_files["calibration"], "batch": 4}
        if store is not None:
            calibration["store"] = str(store)
        arguments.setdefault("model", str(tiny_llama_folder))
        recipe = {
            "calibration": calibration,
            "stages": [{"prune": {"order": "independent", **prune}}],
            "measure": {"speed": None},
        }
        return sparity.run(recipe, output=tmp_path / output, **arguments)

    return execute


AGAIN = [
    {"solver": "sparsegpt"},
    {"solver": "sparsegpt", "sparsity": 0.7},
    {"solver": "sparsegpt", "pattern": "2:4"},
    {"score": "wanda", "pattern": "4:8"},
    {"score": "ria", "budget": "owl"},
    {"score": "taylor"},
    {"score": "gblm", "solver": "sparsegpt"},
    {"score": "wanda_plus_plus"},
]


def test_every_method_reads_one_store_and_gives_what_it_gives_without(run, tmp_path, monkeypatch):
    expected = [weight_files(run(prune, f"plain-{i}", store=None).path) for i, prune in enumerate(AGAIN)]
    run({"score": "gblm", "solver": "sparsegpt", "budget": "owl"}, "first")
    run({"score": "taylor", "solver": "sparsegpt"}, "second")  # reads more, so the store is gathered anew
    run({"score": "wanda_plus_plus"}, "third")
    before = contents(tmp_path / "store")
    monkeypatch.setattr(Block, "run", None)  # a forward pass fails
    monkeypatch.setattr(Decoder, "inputs", None)
    found = [weight_files(run(prune, f"stored-{i}").path) for i, prune in enumerate(AGAIN)]
    assert found == expected
    assert contents(tmp_path / "store") == before


def test_killed_before_every_rename(run, tmp_path):
    prune = {"score": "gblm", "solver": "sparsegpt"}
    whole = weight_files(run(prune, "whole", store=None).path)
    for count in range(1, 100):
        output, store = f"killed-{count}", tmp_path / f"store-{count}"
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch, lambda path, name=store.name: name in str(path))  # a run's own: of every run
            try:
                run(prune, output, store)
                break
            except Killed:
                pass
        assert weight_files(run(prune, output, store, resume=True).path) == whole
        assert not (tmp_path / f"store-{count}.partial").exists()
    # its manifest, 9 of gradients, three blocks of statistics and progress, its contents
    assert count > 1 + 9 + 3 * 2 + 1


def test_a_store_that_holds_less_is_gathered_anew(run, tmp_path, monkeypatch):
    run({"score": "wanda"}, "first")
    monkeypatch.setattr(Decoder, "inputs", None)
    run({"score": "wanda", "sparsity": 0.25}, "second")
    with pytest.raises(TypeError):  # Gram matrices: a forward pass
        run({"solver": "sparsegpt"}, "third")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_store_is_noticed(run, tmp_path, damage):
    run({"score": "wanda"}, "first")
    path = tmp_path / "store" / "statistics-00001.safetensors"
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        CorruptFile, match=r"statistics-00001.* is missing or damaged .*gather it anew in another folder"
    ):
        run({"score": "wanda"}, "second")
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": 1}', '{"format": 1, "identity": 3, "needs": [], "files": {}}']
)
def test_a_damaged_manifest_is_noticed(run, tmp_path, text):
    run({"score": "wanda"}, "first")
    (tmp_path / "store" / "statistics.json").write_text(text)
    with pytest.raises(CorruptFile, match=r"statistics\.json"):
        run({"score": "wanda"}, "second")


def test_a_store_of_something_else_is_refused(run, tmp_path, token_files, family_models):
    run({"score": "wanda"}, "first")
    other = tmp_path / "other"
    family_models["llama"].save_pretrained(other)
    with pytest.raises(RunConflict, match=r"store holds statistics of another model: choose another folder"):
        run({"score": "wanda"}, "second", model=str(other))
    tokens = np.load(token_files["calibration"])
    np.save(tmp_path / "other.npy", tokens[::-1])
    recipe = {
        "calibration": {"tokens": str(tmp_path / "other.npy"), "store": str(tmp_path / "store")},
        "stages": [{"prune": {"order": "independent"}}],
        "measure": {"speed": None},
    }
    with pytest.raises(RunConflict, match="statistics of another calibration tokens and model"):
        sparity.run(recipe, model=str(other), output=tmp_path / "third")
    content = json.loads((tmp_path / "store/statistics.json").read_text())
    (tmp_path / "store/statistics.json").write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(InvalidInput, match="has format 2; this release reads format 1"):
        run({"score": "wanda"}, "fourth")


def test_places_and_orders_that_make_no_sense(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(RunConflict, match="mine exists and is no statistics store"):
        run({"score": "wanda"}, "out", store=tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"
    with pytest.raises(InvalidInput, match=r"set `order: independent`, or leave the store out"):
        run({"score": "wanda", "order": "sequential"}, "out")
    for place in (tmp_path / "out2", tmp_path / "out2" / "store", tmp_path / "out2.partial" / "store", tmp_path):
        with pytest.raises(InvalidInput, match="must lie apart"):
            run({"score": "wanda"}, "out2", store=place)
    assert not (tmp_path / "out2").exists()
    assert run({"score": "magnitude"}, "plain").report  # reads no statistics: the store is not touched
    assert not (tmp_path / "store").exists()


def test_sequential_pruning_may_read_its_budget_from_the_store(run, tmp_path):
    expected = run({"budget": "owl", "order": "sequential"}, "plain", store=None).path
    found = run({"budget": "owl", "order": "sequential"}, "stored").path
    assert weight_files(found) == weight_files(expected)
    assert StatisticsStore.open(tmp_path / "store", identity(tmp_path)).needs == {"column_norm", "mean"}


def identity(folder):
    return json.loads((folder / "store/statistics.json").read_text())["identity"]


def test_an_expert_without_tokens_comes_back_as_one(run, family_models, tmp_path):
    import copy

    model = copy.deepcopy(family_models["mixtral"])
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()
    prune = {"solver": "sparsegpt", "unseen_expert": "magnitude"}
    expected = weight_files(run(prune, "plain", store=None, model=model).path)
    run(prune, "first", model=model)
    assert weight_files(run(prune, "again", model=model).path) == expected


@pytest.mark.parametrize("needs", [{"score": "wanda"}, {"solver": "sparsegpt"}])
def test_the_plan_tells_its_bytes(run, tmp_path, token_files, tiny_llama_folder, needs):
    run(needs, "first")
    real = sum(path.stat().st_size for path in (tmp_path / "store").glob("*.safetensors"))
    recipe = Recipe.read(
        {
            "calibration": {"tokens": token_files["calibration"], "store": str(tmp_path / "new")},
            "stages": [{"prune": {"order": "independent", **needs}}],
        }
    )
    job = prepare(recipe, str(tiny_llama_folder))
    told = plan(job).disk["statistics"]
    assert told == store_bytes(job.decoder, {"mean", "column_norm"} | job.stages[0].stage.needs().statistics)
    assert 0 <= real - told < 3 * 8192  # the headers


def test_gram_matrices_wider_than_a_panel_are_whole_again(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from sparity.calibration import Statistics
    from sparity.calibration.input_statistics import gram

    monkeypatch.setattr(gram, "PANEL", 3)
    inputs = torch.randn(2, 5, 8)
    gathered = Statistics.gather("here", ["gram", "mean"])
    gathered.add(inputs)
    x = inputs.reshape(-1, 8)
    kept = StatisticsStore(tmp_path)
    kept.save(0, {"here": gathered})
    kept.close({}, ["gram", "mean"])
    weight = torch.zeros(2, 8)
    site = SimpleNamespace(name="here", projections=(SimpleNamespace(weight=weight),))
    block = SimpleNamespace(index=0, module=torch.nn.Linear(1, 1))
    read = StatisticsStore.open(tmp_path, {}).read(block, site)
    torch.testing.assert_close(read.gram, x.T @ x, rtol=1e-5, atol=1e-5)
    assert torch.equal(read.gram, gathered.gram)
    assert torch.equal(read.mean, gathered.mean)
    assert (read.tokens, read.sequences) == (10, 2)


def test_files_of_something_else_in_a_store_are_never_removed(run, tmp_path):
    run({"score": "wanda"}, "first")
    (tmp_path / "store" / "notes.txt").write_text("mine")
    run({"score": "wanda", "sparsity": 0.3}, "second")  # reads it as it is
    with pytest.raises(RunConflict, match=r"is to be gathered anew and holds other files, notes\.txt among them"):
        run({"solver": "sparsegpt"}, "third")
    assert (tmp_path / "store" / "notes.txt").read_text() == "mine"


def test_a_killed_gathering_is_finished_by_a_run_that_needs_less(run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        dies_at(6, patch)
        with pytest.raises(Killed):
            run({"solver": "sparsegpt"}, "first")
    assert (tmp_path / "store.partial").exists()
    run({"score": "wanda"}, "second")
    assert not (tmp_path / "store.partial").exists()
    assert "gram" in json.loads((tmp_path / "store/statistics.json").read_text())["needs"]


def test_a_store_that_claims_nonsense(run, tmp_path):
    run({"score": "wanda"}, "first")
    path = tmp_path / "store" / "statistics.json"
    content = json.loads(path.read_text())
    for number, needs in enumerate(([1], [["a"]], ["wrong"])):
        path.write_text(json.dumps({**content, "needs": needs}))
        with pytest.raises(CorruptFile, match=r"statistics\.json is damaged"):
            run({"score": "wanda"}, f"again-{number}")


def test_a_killed_gathering_gives_way_to_one_that_needs_more(run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        dies_at(6, patch)
        with pytest.raises(Killed):
            run({"score": "wanda"}, "first")
    expected = weight_files(run({"solver": "sparsegpt"}, "plain", store=None).path)
    assert weight_files(run({"solver": "sparsegpt"}, "second").path) == expected
    assert not (tmp_path / "store.partial").exists()


def test_an_unfinished_gathering_of_another_model_is_refused(run, family_models, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        dies_at(6, patch)
        with pytest.raises(Killed):
            run({"score": "wanda"}, "first")
    before = contents(tmp_path / "store.partial")
    with pytest.raises(RunConflict, match="choose another store, or delete it"):
        run({"score": "wanda"}, "second", model=family_models["llama"])
    assert contents(tmp_path / "store.partial") == before
