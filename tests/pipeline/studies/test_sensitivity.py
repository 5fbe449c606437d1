"""Sensitivity: every part once, the right shares, numbers equal to trials by hand, resumed, and used as a budget."""

import json

import numpy as np
import pytest

import sparity
from families import tiny_configs
from interruptions import Killed, dies_at
from sparity.calibration.cosine import mean_cosine
from sparity.errors import InvalidInput, RunConflict
from sparity.models import Decoder
from sparity.models.model_parts import model_flops, parts
from sparity.stages.trials import Trials


@pytest.fixture
def recipe(token_files):
    def build(prune=None, **sections):
        return {
            "calibration": {"tokens": token_files["calibration"], "batch": 4},
            "stages": [{"prune": {"unseen_expert": "magnitude", **(prune or {})}}],
            "measure": {"perplexity": [token_files["text"]], "window": 16, "windows": 3, "speed": None},
            **sections,
        }

    return build


@pytest.mark.parametrize("family", tuple(tiny_configs()))
def test_the_parts_of_a_model_cover_it_three_times(family_models, family):
    decoder = Decoder.open(family_models[family])
    everything = {p.name: p.weight.numel() for i in range(3) for site in decoder.sites(i) for p in site.projections}
    found = list(parts(decoder))
    for chosen in (
        [part for part in found if part.kind == "layer"],
        [part for part in found if part.kind != "layer" and part.block is not None],
        [part for part in found if part.block is None],
    ):
        names = [name for part in chosen for name in part.projections]
        assert sorted(names) == sorted(everything)
        assert sum(part.parameters for part in chosen) == sum(everything.values())
    assert {part.kind for part in found} == {"layer", "attention", "mlp"}
    assert len({part.name for part in found}) == len(found)
    attention = next(part for part in found if part.name == "attention of all blocks")
    assert all("attn" in name or "attention" in name for name in attention.projections)


def test_flops_by_hand(family_models):
    decoder = Decoder.open(family_models["llama"])
    config = decoder.config
    weights = sum(p.weight.numel() for i in range(3) for site in decoder.sites(i) for p in site.projections)
    width = config.num_attention_heads * config.head_dim
    attention = 3 * 2 * width * 10  # 3 blocks; products with keys and values; half of 20 tokens; 2 operations each
    assert model_flops(decoder, 20) == 2 * weights + 2 * attention + 2 * config.hidden_size * config.vocab_size
    moe = Decoder.open(family_models["mixtral"])
    visited = moe.config.num_experts_per_tok / moe.config.num_local_experts
    up = next(part for part in parts(moe) if part.role == "up")
    assert up.flops == pytest.approx(2 * up.parameters * visited)


def test_the_rows_are_what_trials_measure(family_models, recipe, tmp_path):
    model = family_models["llama"]
    result = sparity.sensitivity(recipe({"score": "wanda"}), [0.8, 0.4], model=model, output=tmp_path / "out")
    report = result.report
    assert report.ratios == (0.4, 0.8)
    assert len(report.rows) == 2 * (3 * 7 + 3 * 2 + 2)
    assert json.loads((tmp_path / "out/sensitivity.json").read_text()) == report.to_dict()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sensitivity.html", "sensitivity.json"]
    page = (tmp_path / "out/sensitivity.html").read_text()
    assert "<script" not in page
    for row in report.rows:
        assert row.kl > 0
        assert row.change == pytest.approx(row.perplexity / report.dense_perplexity - 1)
    total = sum(row.parameters for row in report.of("layer", 0.4))
    assert total == pytest.approx(sum(row.parameters for row in report.rows if row.block is None) / 2)
    assert 0 < sum(row.flops for row in report.of("layer", 0.4)) < 1
    row = next(r for r in report.of("layer", 0.8) if r.name == "model.layers.1.mlp.up_proj")
    # the same by a run that prunes this layer alone, in the independent order
    dense = [name for r in report.of("layer", 0.8) for name in r.projections if name != row.name]
    overrides = {row.name: 0.8}
    share = 0.8 * row.parameters / total
    alone = recipe(
        {"score": "wanda", "order": "independent", "dense": dense, "overrides": overrides, "sparsity": share}
    )
    quality = sparity.run(alone, model=model, output=tmp_path / "alone").report.candidates[0].quality[0]
    assert row.kl == pytest.approx(quality.kl, rel=1e-3, abs=1e-7)
    assert row.perplexity == pytest.approx(quality.perplexity, rel=1e-4)
    assert report.dense_perplexity == pytest.approx(quality.dense_perplexity, rel=1e-5)


def test_blocks_tell_their_cosine_and_their_experts(family_models, recipe, token_files):
    model, tokens = family_models["mixtral"], np.load(token_files["calibration"]).size
    report = sparity.sensitivity(recipe({"score": "wanda"}), [0.5], model=model).report
    assert [facts.block for facts in report.blocks] == [0, 1, 2]
    for facts in report.blocks:
        assert 0 < facts.cosine < 1
        assert len(facts.expert_tokens) == model.config.num_local_experts
        assert sum(facts.expert_tokens.values()) == tokens * model.config.num_experts_per_tok
    layers = report.of("layer")
    assert {len(row.projections) for row in layers if row.role == "up"} == {model.config.num_local_experts}
    assert all(
        not facts.expert_tokens
        for facts in sparity.sensitivity(recipe({"score": "magnitude"}), [0.5], model=model).report.blocks
    )


def test_cosine_by_hand():
    import torch

    before = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [3.0, 0.0]]])
    behind = torch.tensor([[[2.0, 0.0], [1.0, 0.0]], [[-1.0, -1.0], [0.0, 5.0]]])
    assert mean_cosine(before, behind) == pytest.approx((1 + 0 - 1 + 0) / 4, abs=1e-6)


def test_a_fixed_pattern_has_one_ratio(family_models, recipe):
    report = sparity.sensitivity(recipe({"pattern": "2:4"}), [0.3, 0.7], model=family_models["llama"]).report
    assert report.ratios == (0.5,)


def test_killed_and_resumed(tiny_llama_folder, recipe, tmp_path, monkeypatch):
    chosen = recipe({"score": "wanda"}, model=str(tiny_llama_folder))
    whole = sparity.sensitivity(chosen, [0.5], output=tmp_path / "whole").report
    with pytest.MonkeyPatch.context() as patch:
        dies_at(25, patch)
        with pytest.raises(Killed):
            sparity.sensitivity(chosen, [0.5], output=tmp_path / "out")
    with pytest.raises(RunConflict, match="--resume"):
        sparity.sensitivity(chosen, [0.5], output=tmp_path / "out")
    measured = []
    run = Trials._run
    monkeypatch.setattr(Trials, "_run", lambda self, *given: measured.append(1) or run(self, *given))
    resumed = sparity.sensitivity(chosen, [0.5], output=tmp_path / "out", resume=True).report
    assert resumed.rows == whole.rows
    assert 0 < len(measured) < len(whole.rows)


def test_its_table_is_a_budget(tiny_llama_folder, recipe, tmp_path, monkeypatch):
    chosen = recipe({"score": "wanda"}, model=str(tiny_llama_folder))
    sparity.sensitivity(chosen, [0.3, 0.5, 0.7], output=tmp_path / "out")
    monkeypatch.setattr(Trials, "_run", None)  # nothing is measured again
    table = str(tmp_path / "out" / "sensitivity.json")
    budget = {"knapsack": {"table": table}}
    result = sparity.run(recipe({"budget": budget}, model=str(tiny_llama_folder)), output=tmp_path / "pruned")
    candidate = result.report.candidates[0]
    assert candidate.target == pytest.approx(0.5, abs=1e-9)
    assert len({round(layer.target, 6) for layer in candidate.changes}) > 1


@pytest.mark.parametrize("ratios", [[], [0.0], [1.0], [-0.5, 0.5], [float("nan")], [True]])
def test_ratios_that_make_no_sense(family_models, recipe, ratios):
    with pytest.raises(InvalidInput, match="give at least one, each between 0 and 1"):
        sparity.sensitivity(recipe(), ratios, model=family_models["llama"])


def test_it_needs_a_text(family_models, recipe):
    with pytest.raises(InvalidInput, match="sensitivity measures on a text"):
        sparity.sensitivity(recipe(measure={"speed": None}), model=family_models["llama"])


def test_a_resume_with_another_text_or_table_is_refused(tiny_llama_folder, recipe, token_files, tmp_path):
    text = tmp_path / "text.npy"
    np.save(text, np.load(token_files["text"]))
    chosen = recipe({"score": "wanda"}, model=str(tiny_llama_folder))
    chosen["measure"]["perplexity"] = [str(text)]
    with pytest.MonkeyPatch.context() as patch:
        dies_at(25, patch)
        with pytest.raises(Killed):
            sparity.sensitivity(chosen, [0.5], output=tmp_path / "out")
    np.save(text, np.load(token_files["text"])[::-1])
    with pytest.raises(RunConflict, match="different: measured"):
        sparity.sensitivity(chosen, [0.5], output=tmp_path / "out", resume=True)
    np.save(text, np.load(token_files["text"]))
    table = sparity.sensitivity(chosen, [0.3, 0.5, 0.7], output=tmp_path / "done").path / "sensitivity.json"
    budget = recipe({"budget": {"knapsack": {"table": str(table)}}}, model=str(tiny_llama_folder))
    with pytest.MonkeyPatch.context() as patch:
        dies_at(5, patch)
        with pytest.raises(Killed):
            sparity.run(budget, output=tmp_path / "pruned")
    content = json.loads(table.read_text())
    content["rows"][0]["kl"] += 1
    table.write_text(json.dumps(content))
    with pytest.raises(RunConflict, match=r"different: files\.stages\.0\.table"):
        sparity.run(budget, output=tmp_path / "pruned", resume=True)
