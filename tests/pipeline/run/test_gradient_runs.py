"""Recipes whose score reads gradients: the right masks, the dense model's gradients, resumed bit by bit."""

import copy
from functools import partial

import pytest
import torch

import sparity
from families import tiny_configs
from interruptions import Killed, dies_at, weight_files
from sparity.calibration.statistics import WEIGHT_GRADIENTS
from sparity.errors import InvalidInput, NumericalError
from sparity.models import Decoder
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.plan import plan
from sparity.recipe import Recipe


def recipe(token_files, prune, **sections):
    calibration = {"tokens": token_files["calibration"], "batch": 4}
    return Recipe.read(
        {"calibration": calibration, "stages": [{"prune": prune}], "measure": {"speed": None}, **sections}
    )


def weights_of(model):
    decoder, weights = Decoder.open(model), {}
    for index in range(len(decoder)):
        with decoder.block(index) as block:
            weights.update({projection.name: projection.weight.clone() for projection in block.projections})
    return weights


def gradients_of(model, tokens):
    """Module name -> one gradient `[samples, out, in]`, by plain autograd over a model of `nn.Linear`."""
    model, found = copy.deepcopy(model), {}
    for ids in tokens:
        model.zero_grad()
        model(ids[None], labels=ids[None], use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            found.setdefault(name.removesuffix(".weight"), []).append(parameter.grad.clone())
    return {name: torch.stack(parts) for name, parts in found.items()}


@pytest.mark.parametrize("score", ["gradient", "fisher", "taylor"])
@pytest.mark.parametrize("order", ["sequential", "independent"])
def test_a_run_prunes_by_the_dense_models_gradients(family_models, token_files, tmp_path, score, order):
    import numpy as np

    model = family_models["llama"]
    tokens = torch.tensor(np.load(token_files["calibration"]))
    gradients = gradients_of(model, tokens)
    result = sparity.run(
        recipe(token_files, {"score": score, "order": order}), model=model, output=tmp_path / "out", device="cpu"
    )
    dense = weights_of(model)
    for name, weight in weights_of(result.model()).items():
        expected = sparity.prune_weight(dense[name], gradients=gradients[name], score=score)[1]
        differing = int((expected != (weight != 0)).sum())
        assert differing <= 2, name  # a tie within float32's rounding may fall either way


def seen_by(model, tokens):
    """Module name -> its inputs `[samples, tokens, in]`, and the gradients of each summed loss at its outputs."""
    model, inputs, slopes = copy.deepcopy(model), {}, {}

    def see(name, module, given, output):
        inputs.setdefault(name, []).append(given[0][0].detach())
        output.register_hook(lambda slope: slopes.setdefault(name, []).append(slope[0].clone()))

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(partial(see, name))
    for ids in tokens:
        (model(ids[None], labels=ids[None], use_cache=False).loss * (len(ids) - 1)).backward()
    return tuple({name: torch.stack(parts) for name, parts in found.items()} for found in (inputs, slopes))


@pytest.mark.parametrize("group", [None, "global"])
def test_a_run_of_llm_surgeon_is_that_of_its_matrices(family_models, token_files, tmp_path, group):
    import numpy as np

    model = family_models["llama"]
    inputs, slopes = seen_by(model, torch.tensor(np.load(token_files["calibration"])))
    chosen = {"solver": "llm_surgeon", "order": "independent", "compare_within": group}
    result = sparity.run(recipe(token_files, chosen), model=model, output=tmp_path / "out", device="cpu")
    found, dense = weights_of(result.model()), weights_of(model)
    if group == "global":
        assert sum(int((w == 0).sum()) for w in found.values()) == sum(w.numel() for w in dense.values()) // 2
        assert len({round(float((w == 0).float().mean()), 2) for w in found.values()}) > 3
    for name, weight in found.items():
        zeros = int((weight == 0).sum())
        share = 0.5 if group is None else (zeros - 0.5) / weight.numel()
        known = {"inputs": inputs[name], "output_gradients": slopes[name], "solver": "llm_surgeon", "sparsity": share}
        expected, keep = sparity.prune_weight(dense[name], **known)
        assert int((keep != (weight != 0)).sum()) <= 2, name
        torch.testing.assert_close(weight, expected, rtol=0.01, atol=0.01 * float(weight.abs().max()))


def test_llm_surgeon_refuses_experts_before_anything_is_read(family_models, token_files):
    with pytest.raises(InvalidInput, match="gradients at the outputs of experts cannot be seen"):
        prepare(recipe(token_files, {"solver": "llm_surgeon"}), family_models["mixtral"], "cpu")


@pytest.mark.parametrize("family", tuple(tiny_configs()))
@pytest.mark.parametrize("score", ["gblm", "fisher"])
def test_every_family_runs(family_models, token_files, tmp_path, family, score):
    result = sparity.run(
        recipe(token_files, {"score": score}), model=family_models[family], output=tmp_path / "out", device="cpu"
    )
    for name, weight in weights_of(result.model()).items():
        assert 0.45 < float((weight == 0).float().mean()) < 0.55, name
    assert not (tmp_path / "out" / ".sparity").exists()


def test_killed_before_every_rename(tiny_llama_folder, token_files, tmp_path):
    chosen = recipe(token_files, {"score": "gblm"}, model=str(tiny_llama_folder))
    whole = sparity.run(chosen, output=tmp_path / "whole").path
    died = 0
    for count in range(1, 100):
        output = tmp_path / f"killed-{count}"
        with pytest.MonkeyPatch.context() as patch:
            dies_at(count, patch)
            try:
                sparity.run(chosen, output=output)
                break
            except Killed:
                died += 1
        resumed = sparity.run(chosen, output=output, resume=True)
        assert weight_files(resumed.path) == weight_files(whole)
        assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())
    # manifest, first shard; gradients: three inputs, the head's, three results with two between them; three blocks of
    # shard and progress
    assert died >= 2 + 9 + 3 * 2


def test_an_expert_without_tokens_is_treated_as_the_recipe_says(family_models, token_files, tmp_path):
    model = copy.deepcopy(family_models["mixtral"])
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()  # two experts take every token
    with pytest.raises(NumericalError, match=r"experts\.\d\.w1: no calibration token was routed to this expert"):
        sparity.run(recipe(token_files, {"score": "fisher"}), model=model, output=tmp_path / "out", device="cpu")
    prune = {"score": "fisher", "unseen_expert": "dense"}
    result = sparity.run(recipe(token_files, prune), model=model, output=tmp_path / "dense", device="cpu")
    share = [float((w == 0).float().mean()) for n, w in weights_of(result.model()).items() if "layers.1.block" in n]
    assert sorted(round(s, 1) for s in share) == [0.0] * 6 + [0.5] * 6


@pytest.mark.parametrize("score", ["gradient", "taylor", "gblm", "wanda", "obs"])
def test_an_expert_that_sees_tokens_and_does_nothing_with_them_is_pruned(
    family_models, token_files, tmp_path, caplog, score
):
    model = copy.deepcopy(family_models["mixtral"])
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[:, 64:] = 0  # up, so that down sees only zeros
    chosen = recipe(token_files, {"score": score, "sparsity": 0.5})
    result = sparity.run(chosen, model=model, output=tmp_path / "out", device="cpu")
    assert all((w == 0).float().mean() >= 0.45 for w in weights_of(result.model()).values())
    assert caplog.text.count("layers.1.block_sparse_moe.experts.0.w2: ") == 1
    assert "no calibration token" not in caplog.text


def test_the_plan_tells_the_bytes_and_short_samples_are_refused(family_models, token_files):
    model = family_models["llama"]
    job = prepare(recipe(token_files, {"score": "taylor"}), model, "cpu")
    needs = job.stages[0].stage.needs()
    assert (needs.statistics, needs.gradients) == (frozenset(), set(WEIGHT_GRADIENTS))
    found = plan(job)
    (stage,) = found.stages
    projections = sum(change.size for change in stage.changes)
    assert found.disk == {"gradients": projections * 4 * 2 + 5 * 6 * 24 * 32 * 4}
    assert stage.statistics == ("gradient", "gradient_square")
    assert found.memory["gradients"] > 0
    plain = plan(prepare(recipe(token_files, {"score": "wanda"}), model, "cpu"))
    assert plain.disk == {}
    assert "gradients" not in plain.memory
    with pytest.raises(InvalidInput, match=r"fisher.*needs calibration text"):
        prepare(Recipe.read({"stages": [{"prune": {"score": "fisher"}}]}), model, "cpu")


def test_samples_of_two_tokens_are_refused(family_models, tmp_path):
    import numpy as np

    np.save(tmp_path / "short.npy", np.ones((3, 2), dtype=np.int64))
    short = recipe({"calibration": str(tmp_path / "short.npy")}, {"score": "gradient"})
    with pytest.raises(InvalidInput, match="at least 3 tokens, got 2: raise `length`"):
        prepare(short, family_models["llama"], "cpu")
