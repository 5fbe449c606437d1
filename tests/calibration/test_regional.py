"""Gradients of a block's own output, against plain autograd on whole modules."""

import copy

import pytest
import torch

import sparity
from families import tiny_configs
from sparity.calibration.regional import regional_gradients
from sparity.calibration.walk import walk
from sparity.errors import NumericalError
from sparity.models import Decoder

TOKENS = torch.arange(3 * 12).reshape(3, 12) % 97


@pytest.mark.parametrize("family", tuple(tiny_configs()))
def test_equal_to_autograd_for_every_sequence(family_models, family):
    model = copy.deepcopy(family_models[family])
    decoder = Decoder.open(model)
    inputs = decoder.inputs(TOKENS, 1)
    for visit in walk(decoder, inputs):
        found = regional_gradients(visit.block, visit.inputs, visit.hidden)
        name = visit.block.name
        module = model.get_submodule(name)
        sites = decoder.family.sites(module, name, model.config)
        expected = {projection.name: 0.0 for site in sites for projection in site.projections}
        arguments = inputs.arguments[1][visit.block.index]
        for sequence in visit.hidden:
            model.zero_grad()
            output = module(sequence[None], **arguments)
            output = output[0] if isinstance(output, tuple) else output
            output.square().sum().sqrt().backward()
            for site in sites:
                for projection in site.projections:
                    if projection.gradient is not None:
                        expected[projection.name] += projection.gradient.square() / len(TOKENS)
        assert found.keys() == expected.keys()
        for projection, mean in expected.items():
            mean = torch.as_tensor(mean).expand_as(found[projection])  # an expert without tokens has zeros
            torch.testing.assert_close(found[projection], mean, rtol=1e-3, atol=1e-7)
        assert not any(parameter.requires_grad for parameter in visit.block.module.parameters())


def test_a_gradient_that_is_not_finite_is_an_error(family_models):
    model = copy.deepcopy(family_models["llama"])
    decoder = Decoder.open(model)
    inputs = decoder.inputs(TOKENS, 1)
    with decoder.block(0) as block, torch.no_grad():
        block.projections[-1].weight.fill_(float("inf"))
        with pytest.raises(NumericalError, match="gradient of the block's output holds NaN"):
            regional_gradients(block, inputs, inputs.hidden)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_run_prunes_by_them_behind_pruned_blocks(family_models, token_files, tmp_path, batch):
    recipe = {
        "calibration": {"tokens": token_files["calibration"], "batch": batch},
        "stages": [{"prune": {"score": {"wanda_plus_plus": {"alpha": 1000.0}}}}],
        "measure": {"speed": None},
    }
    model = family_models["llama"]
    result = sparity.run(recipe, model=model, output=tmp_path / "out", device="cpu")
    wanda = {**recipe, "stages": [{"prune": {"score": "wanda"}}]}
    other = sparity.run(wanda, model=model, output=tmp_path / "wanda", device="cpu")
    mine, theirs = (Decoder.open(found.path) for found in (result, other))
    with mine.block(1) as a, theirs.block(1) as b:
        pairs = zip(a.projections, b.projections, strict=True)
        differing = [bool(((p.weight == 0) != (q.weight == 0)).any()) for p, q in pairs]
    assert any(differing)
    assert result.report.candidates[0].sparsity == pytest.approx(0.5, abs=0.02)
