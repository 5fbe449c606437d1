"""What a budget adds to a stage's needs, and each projection's share: alike for weights and for run time."""

from dataclasses import dataclass, field

import pytest

from sparity import registry
from sparity.models import Decoder
from sparity.pipeline.evidence.dense_statistics import dense_statistics, stored_needs
from sparity.pipeline.evidence.model_evidence import PassEvidence
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.progress import Silence
from sparity.pipeline.run.run_folder import RunFolder
from sparity.recipe import Recipe
from sparity.stages import Needs
from sparity.stages.allocation import allocation_of, build_budget, files_of, projections, sites_of, with_budget

SEARCHES = [
    {"greedy": {"samples": 2, "step": 0.2, "spread": 0.2, "per": "block"}},
    {"knapsack": {"samples": 2, "step": 0.2, "spread": 0.2, "per": "block"}},
    {"evopress": {"samples": 2, "generations": 2, "offspring": 4, "survivors": 2, "per": "block"}},
    {"block_greedy": {"samples": 1, "step": 0.05}},
]


def test_needs_of_a_budget_that_measures_are_the_stages_own_of_the_whole_model():
    own = Needs(statistics=frozenset({"gram"}), gradients=frozenset({"gradient"}), decision=frozenset({"mean"}))
    found = with_budget(own, build_budget({"knapsack": {"samples": 5}}))
    assert found.decision == {"gram", "gradient", "mean"}
    assert (found.repeated, found.trials) == (True, 5)
    assert (found.statistics, found.gradients) == (own.statistics, own.gradients)


def test_needs_of_other_budgets_are_what_they_observe():
    own = Needs(statistics=frozenset({"gram"}))
    assert with_budget(own, build_budget("owl")) == Needs(
        statistics=frozenset({"gram"}), decision=frozenset({"column_norm"})
    )
    assert with_budget(own, build_budget("uniform")) == own
    assert files_of(build_budget({"knapsack": {"table": "x.json"}})) == {"table": "x.json"}
    assert files_of(build_budget("owl")) == {}


@dataclass
class Facts:
    """Evidence that hurts most in the first block; notes what was asked."""

    asked: list = field(default_factory=list)

    def trial(self, decision, samples=None):
        self.asked.append((set(decision["sparsity"]), samples))
        return sum((5 if ".0." in name else 1) * share**2 for name, share in decision["sparsity"].items())

    def block_error(self, block, decision, error="token"):
        self.asked.append((block, error))
        return sum((5 if name.endswith("down_proj") else 1) * each**2 for name, each in decision["sparsity"].items())


def test_sites_of_a_model(family_models):
    decoder = Decoder.open(family_models["llama"])
    sites = sites_of(decoder, lambda projection, share: projection.weight.numel() * (1 - share))
    names = [projection.name for _, projection in projections(decoder)]
    assert [site.name for site in sites] == names
    assert sites[-1].depth == len(decoder) - 1
    assert sites[-1].milliseconds(0.25) == 0.75 * sites[-1].cost
    assert sites[-1].bytes == sites[-1].cost * decoder.dtype.itemsize


@pytest.mark.parametrize("budget", SEARCHES, ids=lambda budget: next(iter(budget)))
def test_a_part_of_the_projections_shares_the_sparsity_out(family_models, budget):
    decoder, facts = Decoder.open(family_models["llama"]), Facts()
    sites = [site for site in sites_of(decoder) if "mlp" in site.name]
    found = allocation_of(build_budget(budget), sites, facts, 0.4, {"*.1.mlp.down_proj": 0.1})
    assert found.keys() == {site.name for site in sites}
    mean = sum(site.cost * found[site.name] for site in sites) / sum(site.cost for site in sites)
    assert mean == pytest.approx(0.4, abs=1e-9)
    assert found["model.layers.1.mlp.down_proj"] == 0.1
    assert facts.asked
    if "block_greedy" not in budget:
        assert found["model.layers.0.mlp.up_proj"] < found["model.layers.2.mlp.up_proj"]
    draft = allocation_of(build_budget(budget), sites, None, 0.4)
    assert draft == dict.fromkeys(found, 0.4)


def test_a_budget_that_observes_is_told_of_these_projections_only(family_models, token_files, tmp_path):
    recipe = {"calibration": {"tokens": token_files["calibration"]}, "stages": [{"prune": {"budget": "owl"}}]}
    job = prepare(Recipe.read(recipe), family_models["llama"], "cpu")
    with RunFolder.open(tmp_path / "out", job.identity(), force=False, resume=True) as folder:
        evidence = PassEvidence(job.opened, job.stages[0].stage, folder, None, Silence())
        sites = [site for site in sites_of(job.decoder) if site.name.endswith(("q_proj", "k_proj"))]
        found = allocation_of(build_budget({"owl": {"outlier_multiple": 2.0}}), sites, evidence, 0.5)
    assert found.keys() == {site.name for site in sites}
    assert len(set(found.values())) == 3  # one for each block


@pytest.mark.parametrize("budget", SEARCHES, ids=lambda budget: next(iter(budget)))
@pytest.mark.parametrize("stage", ["prune", "activations"])
def test_each_search_on_the_bundled_model_for_both_kinds_of_stages(tmp_path, monkeypatch, budget, stage):
    """The target is met, and what was measured is no worse than uniform: in the whole model, or block by block."""
    recipe = {
        "model": "zoo:llama",
        "calibration": {"text": "python-docs:calibration", "samples": 2, "length": 32, "batch": 2},
        "stages": [{stage: {"sparsity": 0.5}}],
    }
    job = prepare(Recipe.read(recipe), None, "cpu")
    chosen, own = build_budget(budget), job.stages[0].stage
    roles = ("q_proj", "o_proj", "down_proj")
    sites = [site for site in sites_of(job.decoder) if site.name.endswith(roles)]
    needs = with_budget(own.needs(), chosen)
    monkeypatch.setattr(type(own), "needs", lambda self: needs)
    with RunFolder.open(tmp_path / "out", job.identity(), force=False, resume=True) as folder:
        store = dense_statistics(job.opened, stored_needs(needs, False), folder.state / "statistics", Silence())
        with PassEvidence(job.opened, own, folder, store, Silence()) as evidence:
            found = allocation_of(chosen, sites, evidence, 0.5)
            again = allocation_of(chosen, sites, evidence, 0.5)
            uniform = dict.fromkeys(found, 0.5)
            kl = {name: evidence.trial({"sparsity": each}) for name, each in (("found", found), ("uniform", uniform))}
            errors = [
                [evidence.block_error(block, {"sparsity": each}) for each in (found, uniform)]
                for block in range(len(job.decoder))
            ]
    assert found == again
    mean = sum(site.cost * found[site.name] for site in sites) / sum(site.cost for site in sites)
    assert mean == pytest.approx(0.5, abs=1e-9)
    if "block_greedy" in budget:
        assert all(chosen_error <= uniform_error for chosen_error, uniform_error in errors)
        assert found != uniform
    else:
        assert kl["found"] <= kl["uniform"]


def test_what_a_run_time_stage_fitted_is_not_fitted_again(family_models, token_files, tmp_path, monkeypatch):
    recipe = {"calibration": {"tokens": token_files["calibration"]}, "stages": [{"activations": {"sparsity": 0.5}}]}
    job = prepare(Recipe.read(recipe), family_models["llama"], "cpu")
    stage = job.stages[0].stage
    needs = with_budget(stage.needs(), build_budget({"knapsack": {"samples": 1}}))
    monkeypatch.setattr(type(stage), "needs", lambda self: needs)
    fitted = []
    kind = registry.get("stage", "activations")
    fit = kind.fit
    monkeypatch.setattr(kind, "fit", lambda *arguments: fitted.append(arguments[-1]["sparsity"]) or fit(*arguments))
    name, other = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    with RunFolder.open(tmp_path / "out", job.identity(), force=False, resume=True) as folder:
        store = dense_statistics(job.opened, stored_needs(needs, False), folder.state / "statistics", Silence())
        with PassEvidence(job.opened, stage, folder, store, Silence()) as evidence:
            alone = evidence.trial({"sparsity": {name: 0.5}})
            both = evidence.trial({"sparsity": {name: 0.5, other: 0.25}})
            evidence.trial({"sparsity": {name: 0.5, other: 0.25, "model.layers.2.mlp.up_proj": 0.5}})
            evidence.trial({"sparsity": {other: 0.25}})
    here = [each for each in fitted if "model.layers.2.mlp.up_proj" not in each]
    assert here == [{}, {name: 0.5}, {other: 0.25}, {}]  # nothing, for the parts of each block that stay as they are
    assert 0 < alone != both
