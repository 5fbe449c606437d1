"""What sparsity costs, measured block by block: equal to two whole models side by side, each allocation once."""

import copy

import numpy as np
import pytest
import torch

import sparity
from families import tiny_configs
from interruptions import Killed, dies_at, weight_files
from sparity.calibration.store import StatisticsStore
from sparity.models import Decoder
from sparity.pipeline.evidence.dense_statistics import dense_statistics, stored_needs
from sparity.pipeline.evidence.model_evidence import stored_evidence
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.progress import Silence
from sparity.pipeline.run.run_folder import RunFolder
from sparity.quality.agreement import compare
from sparity.recipe import Recipe
from sparity.stages.trials import Trials

FAMILIES = tuple(tiny_configs())


def recipe(token_files, prune, **sections):
    calibration = {"tokens": token_files["calibration"], "batch": 4}
    return Recipe.read(
        {"calibration": calibration, "stages": [{"prune": prune}], "measure": {"speed": None}, **sections}
    )


@pytest.fixture
def trials(token_files, tmp_path):
    def build(model, prune, samples=3):
        chosen = recipe(token_files, {"budget": {"knapsack": {"samples": samples}}, **prune})
        job = prepare(chosen, model, "cpu")
        with RunFolder.open(tmp_path / "out", job.identity(), force=False, resume=True) as folder:
            stage = job.stages[0].stage
            needs = stage.needs()
            store = dense_statistics(job.opened, stored_needs(needs, False), folder.state / "statistics", Silence())
            known = stored_evidence(store, needs.statistics | needs.gradients).read if store else None
            return Trials(job.decoder, stage, folder, job.tokens[:samples], 4, known), store, job

    return build


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trial_is_what_two_whole_models_measure(family_models, token_files, trials, family):
    dense = family_models[family]
    measured, store, job = trials(dense, {"score": "wanda", "unseen_expert": "magnitude"})
    assert isinstance(store, StatisticsStore)
    names = [
        projection.name for index in (1, 2) for site in job.decoder.sites(index) for projection in site.projections
    ]
    shares = {names[0]: 0.5, names[-1]: 0.75}
    found = measured.measure({"sparsity": shares})

    pruned, pruning = copy.deepcopy(dense), job.stages[0].stage.pruning
    decoder = Decoder.open(pruned)
    for index in range(3):
        name = decoder.block_name(index)
        sites = decoder.family.sites(pruned.get_submodule(name), name, pruned.config)
        with decoder.block(index) as block:
            for site, mine in zip(sites, block.sites, strict=True):
                for projection in site.projections:
                    if share := shares.get(projection.name):
                        statistics = store.read(block, mine)
                        projection.write(pruning.apply(projection.weight.clone(), statistics, share)[0])
    tokens = np.load(token_files["calibration"])[:3]
    expected = compare(dense, pruned, tokens.flatten(), tokens.shape[1])
    assert found.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-7)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert measured.measure({"sparsity": {}}).kl == pytest.approx(0.0, abs=1e-7)


def test_an_allocation_is_measured_once_also_by_another_process(family_models, trials, monkeypatch):
    measured, _, _ = trials(family_models["llama"], {"score": "wanda"})
    name = "model.layers.1.mlp.up_proj"
    first = measured.measure({"sparsity": {name: 0.5}})
    assert measured.measure({"sparsity": {name: 0.5, "model.layers.0.mlp.up_proj": 0.0}}) == first
    again, _, _ = trials(family_models["llama"], {"score": "wanda"})
    monkeypatch.setattr(Trials, "_run", None)
    assert again.measure({"sparsity": {name: 0.5}}) == first
    with pytest.raises(TypeError):
        again.measure({"sparsity": {name: 0.25}})


def test_pruned_weights_are_forgotten_when_there_are_too_many(family_models, trials, monkeypatch):
    monkeypatch.setattr("sparity.stages.applied.CACHE_BYTES", 1)
    measured, _, job = trials(family_models["llama"], {"score": "magnitude"})
    shares = {projection.name: 0.5 for site in job.decoder.sites(0) for projection in site.projections}
    found = measured.measure({"sparsity": shares})
    monkeypatch.undo()
    assert found.kl > 0
    assert len(measured.applied.kept) == 1


@pytest.mark.parametrize("budget", ["greedy", "knapsack"])
@pytest.mark.parametrize("prune", [{"score": "wanda"}, {"solver": "sparsegpt", "order": "independent"}])
def test_a_run_is_no_worse_than_uniform_where_it_was_measured(family_models, token_files, tmp_path, budget, prune):
    model = family_models["llama"]
    prune = {**prune, "budget": {budget: {"step": 0.2, "spread": 0.2, "samples": 4}}}
    result = sparity.run(recipe(token_files, prune), model=model, output=tmp_path / "out", device="cpu")
    candidate = result.report.candidates[0]
    assert candidate.target == pytest.approx(0.5, abs=1e-9)
    assert len({round(layer.target, 6) for layer in candidate.changes}) > 1
    uniform = sparity.run(
        recipe(token_files, {**prune, "budget": "uniform"}), model=model, output=tmp_path / "uniform", device="cpu"
    )
    tokens = np.load(token_files["calibration"])[:4]
    kl = {
        name: compare(model, found.model(), tokens.flatten(), tokens.shape[1]).kl
        for name, found in (("measured", result), ("uniform", uniform))
    }
    slack = 1.05 if prune.get("order") != "independent" else 1 + 1e-6  # measured on the dense model's statistics
    assert kl["measured"] <= kl["uniform"] * slack


def test_fewer_samples_are_those_that_come_first(family_models, trials):
    """Also when the last batch is of another size than any before."""
    name = "model.layers.1.mlp.up_proj"
    dense = family_models["llama"]
    whole, _, _ = trials(dense, {"score": "magnitude"}, samples=3)
    decision = {"sparsity": {name: 0.5}}
    of_three = whole.measure(decision, samples=3)
    of_two = whole.measure(decision, samples=2)
    of_one = whole.measure(decision, samples=1)
    assert whole.measure(decision) == whole.measure(decision, samples=9) == of_three
    assert len({of_one.kl, of_two.kl, of_three.kl}) == 3
    fewer = Trials(whole._decoder, whole.applied._stage, whole._folder, whole._tokens[:2], 4)
    fewer._known.clear()
    assert fewer.measure(decision).kl == pytest.approx(of_two.kl, rel=1e-5)


@pytest.mark.parametrize(
    ("error", "of"),
    [
        ("token", lambda dense, found: (found - dense).norm(dim=2).mean()),
        ("teal", lambda dense, found: (found - dense)[:, -(dense.shape[1] // 4) :].norm(dim=1).mean()),
    ],
)
def test_the_error_of_one_block_is_that_of_its_output_on_the_dense_models_inputs(family_models, trials, error, of):
    dense = family_models["llama"]
    measured, _, job = trials(dense, {"score": "magnitude"})
    names = [f"model.layers.{block}.mlp.{role}_proj" for block in (0, 1) for role in ("gate", "down")]
    decision = {"sparsity": dict.fromkeys(names, 0.5)}
    found = measured.block_error(1, decision, error)
    pruned = copy.deepcopy(dense)
    for name in names[2:]:
        module = pruned.get_submodule(name)
        with torch.no_grad():
            module.weight.copy_(job.stages[0].stage.pruning.apply(module.weight.clone(), None, 0.5)[0])
    seen = []
    for model in (dense, pruned):  # what comes before block 1 is the dense model's in both
        take = lambda module, arguments, output: seen.append(output)  # noqa: E731
        with model.model.layers[1].register_forward_hook(take), torch.no_grad():
            model(job.tokens[:3])
    assert found == pytest.approx(float(of(*seen)), rel=1e-5)
    assert found > 0
    assert measured.block_error(2, decision, error) == pytest.approx(0.0, abs=1e-6)


def test_errors_of_blocks_are_remembered(family_models, trials, monkeypatch):
    monkeypatch.setattr("sparity.stages.trials.KEPT_EVERY", 1)
    decision = {"sparsity": {"model.layers.1.mlp.up_proj": 0.5}}
    measured, _, _ = trials(family_models["llama"], {"score": "wanda"})
    first = measured.block_error(1, decision)
    again, _, _ = trials(family_models["llama"], {"score": "wanda"})
    monkeypatch.setattr(Trials, "_moved", None)
    assert again.block_error(1, decision) == first
    with pytest.raises(TypeError):
        again.block_error(1, decision, "teal")


@pytest.mark.parametrize(
    "budget",
    [
        {"evopress": {"samples": 4, "generations": 4, "offspring": 4, "survivors": 2}},
        {"block_greedy": {"samples": 2, "step": 0.1}},
        {"block_greedy": {"samples": 2, "step": 0.03, "reference": True}},
    ],
    ids=str,
)
def test_searches_in_a_run_meet_the_target_twice_alike(family_models, token_files, tmp_path, budget):
    prune = {"score": "wanda", "budget": budget, "overrides": {"*.0.mlp.up_proj": 0.3}}
    model = family_models["llama"]
    targets = []
    for number in range(2):
        result = sparity.run(recipe(token_files, prune), model=model, output=tmp_path / str(number), device="cpu")
        assert result.report.candidates[0].target == pytest.approx(0.5, abs=1e-9)
        targets.append({change.name: change.target for change in result.report.candidates[0].changes})
    assert targets[0] == targets[1]
    assert targets[0]["model.layers.0.mlp.up_proj"] == 0.3
    assert len({round(target, 6) for target in targets[0].values()}) > 2


def killed_and_resumed(chosen, output, count):
    """What a run that died before its rename number `count` comes to when it goes on."""
    with pytest.MonkeyPatch.context() as patch:
        dies_at(count, patch)
        with pytest.raises(Killed):
            sparity.run(chosen, output=output)
    return sparity.run(chosen, output=output, resume=True)


@pytest.mark.parametrize("search", ["evopress", "block_greedy"])
def test_killed_while_searching(tiny_llama_folder, token_files, tmp_path, search):
    options = {
        "evopress": {"samples": 2, "generations": 2, "offspring": 3, "survivors": 2},
        "block_greedy": {"samples": 1, "step": 0.25},
    }
    prune = {"score": "magnitude", "budget": {search: options[search]}}
    chosen = recipe(token_files, prune, model=str(tiny_llama_folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparity.stages.trials.KEPT_EVERY", 2)
        whole = weight_files(sparity.run(chosen, output=tmp_path / "whole").path)
        for count in (4, 8):
            assert weight_files(killed_and_resumed(chosen, tmp_path / str(count), count).path) == whole


def test_killed_while_measuring(tiny_llama_folder, token_files, tmp_path):
    prune = {"score": "wanda", "budget": {"knapsack": {"step": 0.3, "per": "block", "samples": 2}}}
    chosen = recipe(token_files, prune, model=str(tiny_llama_folder))
    whole = weight_files(sparity.run(chosen, output=tmp_path / "whole").path)
    for count in (4, 11, 13, 17, 22):
        resumed = killed_and_resumed(chosen, tmp_path / str(count), count)
        assert weight_files(resumed.path) == whole
        assert not (resumed.path / ".sparity").exists()


def test_an_infinite_loss_is_an_error(family_models, trials):
    broken = copy.deepcopy(family_models["llama"])
    with torch.no_grad():
        broken.model.norm.weight.fill_(1e38)
    measured, _, _ = trials(broken, {"score": "magnitude"})
    with pytest.raises(sparity.SparityError, match="the pruned model gives NaN or infinite losses"):
        measured.measure({"sparsity": {"model.layers.0.mlp.up_proj": 0.5}})
