"""Rescale: the model stays what it was, bit for bit with powers of two, and rounding after it loses less."""

from pathlib import Path

import pytest
import torch
from rewritten_models import logits, matrices, recipe

import sparity
from families import tiny_configs
from sparity.calibration.statistics import Statistics
from sparity.errors import InvalidInput
from sparity.models import Decoder
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe
from sparity.static.quantize.quantizing import Quantizing
from sparity.static.rescale.scales import factors_of
from sparity.static.rescale.sources import sources_of

WHERE = ["norms", "values", "mlp_channels"]


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", tuple(tiny_configs()))
def test_the_logits_stay(family, method, family_models, token_files, tmp_path):
    family_models[family].save_pretrained(tmp_path / "dense")
    for exact in (True, False):
        stage = {"rescale": {"method": method, "group": 8, "steps": 5, "exact": exact}}
        result = sparity.run(recipe(token_files, tmp_path / "dense", stage), output=tmp_path / f"{exact}", device="cpu")
        dense, found = logits(sparity.load(tmp_path / "dense")), logits(sparity.load(result.path))
        assert verify(result.path).problems == ()
        if exact:
            assert torch.equal(found, dense)
        else:
            torch.testing.assert_close(found, dense, rtol=2e-4, atol=2e-5)
    before, after = matrices(tmp_path / "dense"), matrices(tmp_path / "False")
    assert method == "awq" or any(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(before[key] == 0, after[key] == 0) for key in before)


def test_every_channel_has_the_factor_of_what_writes_it(tiny_llama_folder):
    """Query heads that share values share their factors; a row of up is divided by what a column of down gains."""
    decoder = Decoder.open(tiny_llama_folder)
    with decoder.block(0) as block:
        sources = list(sources_of(block, decoder.dimensions(0), decoder.config, WHERE))
        roles = [({reader.role for reader in s.readers}, s.writer and s.writer.role) for s in sources]
        assert roles == [({"q", "k", "v"}, None), ({"gate", "up"}, None), ({"o"}, "v"), ({"down"}, "up")]
        values, channels = sources[2], sources[3]
        heads, width = (
            decoder.config.num_key_value_heads,
            values.writer.weight.shape[0] // decoder.config.num_key_value_heads,
        )
        assert values.units.view(heads, -1, width)[:, 0].flatten().tolist() == list(range(heads * width))
        assert torch.equal(values.units.view(heads, -1, width)[:, 0], values.units.view(heads, -1, width)[:, 1])
        down, up = channels.readers[0].weight.clone(), channels.writer.weight.clone()
        factors = torch.linspace(0.5, 2, down.shape[1])
        channels.scale(factors)
        torch.testing.assert_close(channels.readers[0].weight, down * factors)
        torch.testing.assert_close(channels.writer.weight, up / factors[:, None])


def test_smoothquant_by_hand(tiny_llama_folder):
    """sqrt of the largest input over the largest weight of a column, of both readers together."""
    decoder = Decoder.open(tiny_llama_folder)
    with decoder.block(0) as block:
        source = list(sources_of(block, decoder.dimensions(0), decoder.config, ["norms"]))[1]
        columns = source.readers[0].weight.shape[1]
        largest = torch.linspace(1, 9, columns)
        known = Statistics.gather("x", ("max_absolute",))
        known.add(torch.stack([largest, -largest]))
        found = factors_of(source, known, "smoothquant", False, Quantizing.of(), 1, 0.5)
        weight = torch.cat([reader.weight for reader in source.readers]).abs().amax(0)
        torch.testing.assert_close(found, (largest / weight).sqrt())
        exact = factors_of(source, known, "smoothquant", True, Quantizing.of(), 1, 0.5)
        assert torch.equal(exact.log2(), exact.log2().round())
        assert (exact / found).log2().abs().max() <= 0.5


@pytest.mark.parametrize("exact", [True, False])
def test_what_awq_scales_is_never_further_after_rounding(tiny_llama_folder, exact):
    """Its search counts "no scale" too, on the inputs that it has seen; some columns of these are ten times larger."""
    decoder, rounding = Decoder.open(tiny_llama_folder), Quantizing.of("nearest", 3, 8)
    gained = 0
    with decoder.block(0) as block:
        for source in sources_of(block, decoder.dimensions(0), decoder.config, WHERE):
            columns = source.readers[0].weight.shape[1]
            x = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
            x[:, :: columns // 4] *= 10
            known = Statistics.gather("x", ("gram", "mean_absolute"))
            known.add(x)
            factors = factors_of(source, known, "awq", exact, rounding, 8)
            weight = torch.cat([reader.weight for reader in source.readers])
            errors = []
            for scales in (torch.ones(columns), factors):
                rounded = sparity.quantize_weight(weight * scales, method="nearest", bits=3, group=8).weight / scales
                errors.append(float(((rounded - weight) @ x.T).square().sum()))
            gained += errors[1] < 0.9 * errors[0]
            assert errors[1] <= errors[0] * (1 + 1e-5)
    assert gained


def test_after_pruning_the_zeros_stay(tiny_llama_folder, token_files, tmp_path):
    prune = {"prune": {"score": "magnitude", "sparsity": 0.5}}
    result = sparity.run(
        recipe(token_files, tiny_llama_folder, prune, {"rescale": {"group": 8}}), output=tmp_path / "out", device="cpu"
    )
    changes = result.report.candidates[0].changes
    zeros = {change.name: change.zeros for change in changes if change.stage == "prune"}
    assert {change.name: change.zeros for change in changes if change.stage == "rescale"}.items() <= zeros.items()


def test_its_recipes_run():
    paths = sorted((Path(__file__).parents[3] / "recipes/methods/rescale").glob("*.yaml"))
    assert [path.stem for path in paths] == ["awq_int4", "smoothquant_int8"]
    for path in paths:
        small = ["calibration.samples=2", "calibration.length=64", "measure.windows=1", "measure.speed=null"]
        changes = sparity.run(Recipe.read(path, small), device="cpu").report.candidates[0].changes
        assert {change.stage for change in changes} == {"rescale", "quantize"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": 7}, "a group of 7 does not divide"),
        ({"method": "gptq"}, "method"),
        ({"where": ["heads"]}, "where"),
        ({"alpha": 1.5}, "alpha"),
    ],
)
def test_what_it_refuses(tiny_llama_folder, token_files, options, words):
    with pytest.raises(InvalidInput, match=words):
        sparity.run(recipe(token_files, tiny_llama_folder, {"rescale": options}), device="cpu")
