"""Runs with one threshold over all layers, against all scores put together and sorted."""

import pytest
import torch

import sparity
from interruptions import weight_files
from sparity import registry
from sparity.calibration import walk
from sparity.calibration.evidence import LiveIndependent
from sparity.errors import InvalidInput
from sparity.models import Decoder


def recipe(token_files, prune, **sections):
    calibration = {"tokens": token_files["calibration"], "batch": 4}
    prune = {"compare_within": "global", **prune}
    return {"calibration": calibration, "stages": [{"prune": prune}], "measure": {"speed": None}, **sections}


def projections(model):
    decoder, found = Decoder.open(model), {}
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            found.update({projection.name: projection.weight.clone() for projection in block.projections})
    return found


def dense_scores(model, tokens, score):
    decoder, found = Decoder.open(model), {}
    chosen = registry.build("prune.score", score)
    evidence = LiveIndependent(frozenset(chosen.needs))
    for visit in walk(decoder, decoder.inputs(tokens, 4)):
        for site, statistics in evidence.for_block(visit).sites():
            for projection in site.projections:
                found[projection.name] = chosen.score(projection.weight, statistics)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "obs"])
def test_the_lowest_scores_of_the_model_are_zero(family_models, token_files, tmp_path, family, score):
    import numpy as np

    model = family_models[family]
    prune = {"score": score, "sparsity": 0.4, "order": "independent"}
    result = sparity.run(recipe(token_files, prune), model=model, output=tmp_path / "out", device="cpu")
    scores = dense_scores(model, torch.tensor(np.load(token_files["calibration"])), score)
    everything = torch.cat([values.flatten() for values in scores.values()])
    threshold = everything.sort().values[int(0.4 * len(everything)) - 1]
    shares = set()
    for name, weight in projections(result.model()).items():
        assert torch.equal(weight == 0, scores[name] <= threshold), name
        shares.add(round(float((weight == 0).float().mean()), 2))
    assert len(shares) > 2  # layers differ
    candidate = result.report.candidates[0]
    assert abs(candidate.sparsity - 0.4) < 1e-3
    assert "one threshold" in candidate.name


def test_with_a_solver_in_sequential_order_gradients_and_what_stays_dense(family_models, token_files, tmp_path):
    model = family_models["llama"]
    prune = {
        "score": "gblm",
        "solver": "sparsegpt",
        "sparsity": 0.4,
        "dense": ["*.0.*down_proj"],
        "overrides": {"*.q_proj": 0.1},
    }
    result = sparity.run(recipe(token_files, prune), model=model, output=tmp_path / "out", device="cpu")
    layers = {layer.name: layer for layer in result.report.candidates[0].changes}
    assert layers["model.layers.0.mlp.down_proj"].zeros == 0
    assert layers["model.layers.1.self_attn.q_proj"].zeros == pytest.approx(0.1, abs=0.01)
    assert result.report.candidates[0].sparsity == pytest.approx(0.4, abs=0.005)


def test_resumed_with_the_same_threshold(tiny_llama_folder, token_files, tmp_path):
    from interruptions import Killed, dies_at

    chosen = recipe(token_files, {"score": "wanda"}, model=str(tiny_llama_folder))
    whole = weight_files(sparity.run(chosen, output=tmp_path / "whole").path)
    for count in (3, 8, 12, 15):  # while statistics are gathered, before and after the targets are remembered, later
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
            with pytest.raises(Killed):
                sparity.run(chosen, output=tmp_path / str(count))
        assert weight_files(sparity.run(chosen, output=tmp_path / str(count), resume=True).path) == whole


def test_what_contradicts_it(family_models, token_files, tmp_path):
    for prune, words in (
        ({"pattern": "2:4"}, "leaves nothing to compare across layers"),
        ({"budget": "log_depth"}, "leave budget log_depth out"),
    ):
        with pytest.raises(InvalidInput, match=words):
            sparity.run(recipe(token_files, prune), model=family_models["llama"], output=tmp_path / "out")
    with pytest.raises(InvalidInput, match="one matrix has row and layer"):
        sparity.prune_weight(torch.rand(4, 4), score="magnitude", compare_within="global")
