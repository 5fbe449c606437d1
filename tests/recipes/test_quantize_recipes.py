"""The ready recipes of quantisation: each parses, runs, keeps zeros and leaves as many values as its codes have."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparity
from sparity import registry
from sparity.models import Decoder
from sparity.recipe import Recipe
from sparity.static.quantize.grids.integers import Integers
from sparity.static.quantize.quantizing import Quantizing

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = sorted((RECIPES / "methods" / "quantize").glob("*.yaml"))
PARTS = ("scales", "zeros", "input_scales", "bits", "codebook")
SMALL = ["measure.window=256", "measure.windows=2", "measure.speed=null"]
BITS = {  # recipe -> bits per weight with scales and zero points, of a row of 192 inputs, and the share of zeros
    "nearest": (4 + 32 / 32, 0),
    "nearest_int8": (8 + 32 / 192, 0),
    "nf4": (4 + 32 / 64, 0),
    "e4m3": (8 + 32 / 192, 0),
    "codebook": (3 + 32 / 32, 0),
    "gptq": (4 + 36 / 32, 0),
    "gptq_int4": (4 + 16 / 32, 0),
    "gptq_3_bits": (3 + 35 / 32, 0),
    "awq": (4 + 36 / 32, 0),
    "smoothquant": (8 + 32 / 192, 0),
    "slim_llm": (3 + 35 / 32, 0),
    "wanda_awq": (4 + 36 / 32, 0.5),
    "sparsegpt_2_of_4_gptq": (4 + 36 / 32, 0.5),
    "jsq_int8": (8 + 32 / 192, 0.5),
    "deep_compression": (5, 0.5),
}


def quantizing_of(recipe):
    stage = recipe.stages[-1]
    return Quantizing.of(stage.method, stage.bits, stage.group, stage.symmetric, stage.grid)


def test_every_recipe_has_a_row_and_every_plugin_a_recipe():
    assert {path.stem for path in METHODS} == set(BITS)
    chosen = [quantizing_of(Recipe.read(path)) for path in METHODS]
    assert {each.method.name for each in chosen} == set(registry.names("quantize.method"))
    assert {each.grid.name for each in chosen} == set(registry.names("quantize.grid"))


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_comment_says_what_it_is(path):
    recipe = Recipe.read(path)
    assert recipe.model == "zoo:llama"
    assert recipe.stages[-1].name == "quantize"
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20
    assert "arXiv:" in first
    assert f"sparity run {path.relative_to(RECIPES.parent)} -o OUT" in path.read_text()


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_runs_to_the_end_with_its_bits_and_the_zeros_before_it(path, tmp_path):
    recipe = Recipe.read(path)
    samples = 1 if path.stem == "slim_llm" else 4  # it multiplies with them again and again
    small = SMALL + ([f"calibration.samples={samples}"] if recipe.calibration else [])
    recipe = Recipe.read(path, small)
    result = sparity.run(recipe, output=tmp_path / "out")
    candidate, (bits, zeros) = result.report.candidates[0], BITS[path.stem]
    quantizing = quantizing_of(recipe)
    changes = [change for change in candidate.changes if change.stage == "quantize"]
    assert len(changes) == 42
    wide = {change.name: change for change in changes if change.shape_after[1] == 192}
    codebook = 32 * 2**bits if quantizing.method.fits_codebook else 0  # bits for a whole matrix
    sizes = [change.shape_after[0] * change.shape_after[1] for change in wide.values()]
    assert [change.bits for change in wide.values()] == [pytest.approx(bits + codebook / size) for size in sizes]
    assert len(wide) == 36
    pruned = {change.name: change.zeros for change in candidate.changes if change.stage == "prune"}
    assert all(change.zeros >= pruned.get(change.name, 0.0) for change in changes)
    ties = 0.004 if path.stem == "deep_compression" else 0  # by magnitude all weights at the threshold go
    assert all(zeros - 1e-6 <= share <= zeros + ties + 1e-6 for share in pruned.values())
    place = len(recipe.stages) - 1
    kept = load_file(result.path / "sparity-scales" / f"{place:02d}-quantize.safetensors")
    check_values(result.path, kept, quantizing)
    assert candidate.quality[0].kl > 0


def check_values(folder, kept, quantizing):
    """Every weight of the first block is a value of its group's grid as it was recorded, to the model's 8 bits."""
    with Decoder.open(folder).block(0) as block:
        for projection in block.projections:
            parts = {name: kept.get(f"{projection.name}.{name}") for name in PARTS}
            if parts["codebook"] is not None:
                assert set(projection.weight.unique().tolist()) <= set(parts["codebook"].to(torch.bfloat16).tolist())
                continue
            weight, groups = projection.weight.float(), parts["scales"].shape[1]
            weight = weight if parts["input_scales"] is None else weight * parts["input_scales"]
            width = weight.shape[1] // groups
            grouped, scales = weight.view(-1, groups, width), parts["scales"].float()[..., None]
            zeros = torch.zeros_like(scales) if parts["zeros"] is None else parts["zeros"].float()[..., None]
            grids = [quantizing.grid] * groups
            if parts["bits"] is not None:
                grids = [Integers(int(bits), symmetric=False) for bits in parts["bits"]]
            for place, grid in enumerate(grids):
                values = grid.nearest(grouped[:, place], scales[:, place], zeros[:, place])
                torch.testing.assert_close(grouped[:, place], values, rtol=2**-8, atol=1e-6)
