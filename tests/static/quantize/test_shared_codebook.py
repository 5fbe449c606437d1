"""The method `codebook`: k-means by hand and against the plain algorithm, its laws, and what the stage leaves of it."""

import pytest
import quantize_references as plain
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import sparity
from sparity.errors import InvalidInput, NumericalError
from sparity.models import Decoder
from sparity.pipeline.run.packing import convert
from sparity.pipeline.run.verify import verify
from sparity.recipe import Recipe
from sparity.stages.base import Workload
from sparity.static.quantize.methods.codebook import shared_values

STAGE = {"quantize": {"method": "codebook", "bits": 3}}


def fitted(weight, bits, **options):
    return sparity.quantize_weight(weight, method="codebook", bits=bits, **options)


def matrix(seed, rows=12, columns=40, sparsity=0.5):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return torch.where(torch.rand(rows, columns, generator=generator) < sparsity, 0.0, weight)


def error(found, weight):
    return float((found.weight - weight).double().square().sum())


def test_k_means_by_hand():
    weight = torch.tensor([[0.0, 1.0, 2.0, 9.0], [10.0, -3.0, 0.0, 11.0]])
    start = fitted(weight, 2, iterations=0)
    torch.testing.assert_close(start.codebook, torch.tensor([-3.0, 0.0, 19 / 3, 11.0]))  # -3 + 14/3 was nearest to 0
    found = fitted(weight, 2)
    torch.testing.assert_close(found.codebook, torch.tensor([-3.0, 0.0, 19 / 3, 10.0]))  # nobody is nearest to 19/3
    assert found.codes.tolist() == [[1, 1, 1, 3], [3, 0, 1, 3]]
    assert found.weight.tolist() == [[0.0, 0.0, 0.0, 10.0], [10.0, -3.0, 0.0, 10.0]]
    assert (found.scales.tolist(), found.zeros.tolist(), found.bits) == ([[1.0], [1.0]], [[0.0], [0.0]], (2,))
    more = fitted(weight, 3)
    assert more.codebook.tolist() == [-3.0, 0.0, 1.5, 3.0, 5.0, 7.0, 9.5, 11.0]  # 10 lies between 9 and 11: the lower
    assert more.weight.tolist() == [[0.0, 1.5, 1.5, 9.5], [9.5, -3.0, 0.0, 11.0]]


def test_only_weights_that_are_kept_shape_the_codebook():
    weight, keep = torch.tensor([[1.0, 2.0, 100.0, 4.0]]), torch.tensor([[True, True, False, True]])
    found = fitted(weight, 3, keep=keep)
    assert found.weight.tolist() == fitted(weight * keep, 3).weight.tolist() == [[1.0, 2.0, 0.0, 4.0]]
    assert found.codes[0, 2] == found.codebook.tolist().index(0.0) == 0


def test_nothing_but_zeros_equal_weights_and_the_smallest_numbers():
    nothing = fitted(torch.zeros(2, 4), 2)
    assert nothing.weight.count_nonzero() == 0
    assert len(nothing.codebook) == 4
    assert nothing.codebook[nothing.codes.int()].equal(nothing.weight)
    same = fitted(torch.full((2, 4), -0.3), 4)
    assert same.weight.equal(torch.full((2, 4), -0.3))
    tiny = fitted(torch.full((1, 4), 1e-45), 4)  # 16 values between 0 and the smallest number are two
    assert len(tiny.codebook) == 2
    assert tiny.bits == (1,)
    with pytest.raises(NumericalError, match="weight holds NaN"):
        fitted(torch.full((1, 4), torch.nan), 4)


@pytest.mark.parametrize("bits", [2, 4, 5])
@pytest.mark.parametrize("rounds", [0, 1, 6])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_it_is_k_means_written_plainly(bits, rounds, sparsity):
    weight = matrix(bits, sparsity=sparsity)
    expected = plain.k_means(weight[weight != 0], bits, rounds)
    found = fitted(weight, bits, iterations=rounds)
    torch.testing.assert_close(found.codebook.double(), expected, rtol=1e-6, atol=1e-7)
    nearest = (weight[..., None] - found.codebook).abs().argmin(-1)
    assert torch.equal(found.codes.long(), nearest)


@pytest.mark.parametrize("seed", range(3))
def test_at_the_end_every_value_is_the_mean_of_its_weights_and_zero_stays(seed):
    weight = matrix(seed)
    found = fitted(weight, 4)
    for place, value in enumerate(found.codebook):
        members = weight[(found.codes == place) & (weight != 0)]
        if value and len(members):
            assert float(members.double().mean()) == pytest.approx(float(value), rel=1e-6)
    assert 0.0 in found.codebook
    assert torch.equal(fitted(weight, 4, iterations=10_000).weight, found.weight)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60),
    bits=st.integers(2, 8),
    zeros=st.integers(0, 5),
)
def test_few_rising_values_zeros_stay_and_rounds_only_help(values, bits, zeros):
    weight = torch.tensor([values + [0.0] * zeros])
    found, start = fitted(weight, bits), fitted(weight, bits, iterations=0)
    assert 2 <= len(found.codebook) <= 2**bits
    assert (found.codebook.diff() > 0).all()
    assert (found.weight[weight == 0] == 0).all()
    assert torch.equal(found.codebook[found.codes.int()], found.weight)
    assert error(found, weight) <= error(start, weight) * (1 + 1e-4) + 1e-6
    assert torch.equal(fitted(weight.flip(1), bits).codebook, fitted(weight, bits).codebook)


@settings(max_examples=20, deadline=None)
@given(few=st.lists(st.integers(-8, 7), min_size=1, max_size=40))
def test_weights_of_a_linear_grid_come_back_without_a_round(few):
    weight = torch.tensor([[*few, -8, 7]], dtype=torch.float32)  # 16 values at a distance of 1
    assert torch.equal(fitted(weight, 4, iterations=0).weight, weight)
    assert torch.equal(fitted(weight, 4).weight, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_weight_is_kept(dtype):
    weight = matrix(1).to(dtype)
    found = fitted(weight, 3)
    assert found.weight.dtype == dtype
    assert torch.equal(found.weight, fitted(weight.float(), 3).weight.to(dtype))


def test_values_of_a_matrix_lose_less_than_equal_steps_of_it():
    weight = matrix(0, 64, 64, 0.0)
    rounded = sparity.quantize_weight(weight.view(1, -1), bits=4).weight.view(64, 64)
    assert error(fitted(weight, 4), weight) < 0.8 * float((rounded - weight).square().sum())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 1}, "2 to 8 bits"),  # a codebook of 0 and one value more
        ({"bits": 0}, "2 to 8 bits"),  # a codebook of one entry
        ({"bits": 9}, "2 to 8 bits"),
        ({"group": 8}, "group 8: one codebook without scales serves a whole matrix; leave group out"),
        ({"symmetric": False}, "finds the values of each matrix itself, not those of 4 bits, with zero point"),
        ({"grid": "nf4"}, "not those of NF4: give `bits`"),
        ({"grid": {"codebook": {"entries": [0.0]}}}, "2 to 256 entries"),
        ({"scale_type": "float16"}, "leave grid, its options and symmetric out"),
        ({"iterations": -1}, "it must not be negative; 0 keeps equal distances"),
        ({"iteration": 3}, 'did you mean "iterations"'),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, words):
    with pytest.raises(InvalidInput) as caught:
        sparity.quantize_weight(matrix(0), method="codebook", **arguments)
    assert words in str(caught.value)


def recipe_of(*stages):
    return Recipe.read({"stages": list(stages), "measure": {"speed": None}})


def test_the_stage_leaves_a_codebook_per_matrix_and_plan_knows_its_bytes(tiny_llama_folder, tmp_path):
    recipe = recipe_of({"prune": {"score": "magnitude", "sparsity": 0.5}}, STAGE)
    result = sparity.run(recipe, model=str(tiny_llama_folder), output=tmp_path / "out", device="cpu")
    name = "sparity-scales/01-quantize.safetensors"
    kept, dense, after = load_file(result.path / name), Decoder.open(str(tiny_llama_folder)), Decoder.open(result.path)
    assert verify(result.path).problems == ()
    seen = 0
    for index in range(len(dense)):
        with dense.block(index) as before, after.block(index) as block:
            for source, projection in zip(before.projections, block.projections, strict=True):
                pruned, _ = sparity.prune_weight(source.weight, score="magnitude", sparsity=0.5)
                found = fitted(pruned, 3)
                assert torch.equal(projection.weight, found.weight), projection.name
                assert torch.equal(kept[f"{projection.name}.codebook"], found.codebook)
                seen += 1
    assert len(kept) == seen
    stage, decision = recipe.stages[1], recipe.stages[1].decide(dense, None)
    estimate = stage.estimate(dense, decision, Workload(1, 8))
    assert estimate.runtime_bytes == sum(tensor.nbytes for tensor in kept.values()) == seen * 8 * 4
    convert(result.path, tmp_path / "packed")
    assert (tmp_path / "packed" / name).read_bytes() == (result.path / name).read_bytes()
    assert verify(tmp_path / "packed").problems == ()


def test_verify_sees_a_value_more_than_a_codebook_has(tiny_llama_folder, tmp_path):
    recipe = recipe_of(STAGE)
    result = sparity.run(recipe, model=str(tiny_llama_folder), output=tmp_path / "out", device="cpu")
    decoder = Decoder.open(result.path)
    decision = recipe.stages[0].decide(decoder, None)
    with decoder.block(0) as block:
        assert recipe.stages[0].verify(block, decision) == []
        block.projections[0].weight[3, 0] = 0.0123  # a row of its own would still have few values
        (problem,) = recipe.stages[0].verify(block, decision)
    assert problem == "model.layers.0.self_attn.q_proj: 1 matrices have more than 8 values"


def test_values_are_in_the_bits_that_a_table_shows():
    rows, columns = 8, 32
    words = recipe_of(STAGE).stages[0].words
    assert words == "codebook, 3 bits, one per matrix"
    assert recipe_of(STAGE).stages[0].quantizing.bits(rows, columns) == 3 + 8 * 32 / (rows * columns)
    assert len(shared_values(torch.tensor([1.0]), 8, 300)) == 256
