"""The laws of quantisation, for every method and every grid that the registry finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
import sparity
from references import layer
from sparity import registry
from sparity.calibration import Statistics

METHODS = registry.names("quantize.method")
MIXED = "slim_llm"  # for integers only, whose groups have one bit less or more
WHOLE = "codebook"  # of integers it takes the bits alone; one codebook serves a whole matrix
GRIDS = [
    *({"integers": {"width": width, "symmetric": symmetric}} for width in (2, 3, 4, 8) for symmetric in (True, False)),
    {"integers": {"width": 4, "even": True, "scale_type": "bfloat16"}},
    "nf4",
    "e4m3",
    {"codebook": {"entries": [-1.0, -0.25, 0.0, 0.5]}},
]


def suits(method, grid):
    if method == WHOLE:
        return grid in [{"integers": {"width": width, "symmetric": True}} for width in (2, 3, 4, 8)]
    return method != MIXED or ("integers" in grid and "3" in str(grid))


PAIRS = [(method, grid) for method in METHODS for grid in GRIDS if suits(method, grid)]


def group_of(method, group):
    return None if method == WHOLE else group


def ids(value):
    return str(value)


@pytest.mark.parametrize(("method", "grid"), PAIRS, ids=ids)
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 999),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.95, 1.0]),
    group=st.sampled_from([None, 4, 16]),
    dead=st.booleans(),
    given_as_mask=st.booleans(),
)
def test_zeros_before_are_zeros_after_and_codes_fit_their_bits(
    method, grid, seed, sparsity, group, dead, given_as_mask
):
    weight, inputs = layer(5, 32, seed, tokens=40)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) >= sparsity
    group = group_of(method, group)
    if dead:
        inputs[..., 3:9] = 0.0
    weight = weight if given_as_mask else torch.where(keep, weight, -0.0)
    found = sparity.quantize_weight(
        weight, inputs, method=method, grid=grid, group=group, keep=keep if given_as_mask else None
    )
    assert (found.weight[~keep] == 0).all()
    assert not torch.signbit(found.weight[~keep]).any()
    assert found.weight.isfinite().all()
    assert found.scales.shape == found.zeros.shape == (5, 32 // (group or 32))
    assert len(found.bits) == found.scales.shape[1]
    for place, bits in enumerate(found.bits):
        codes = found.codes[:, place * (group or 32) : (place + 1) * (group or 32)]
        for row in codes:
            assert len(row.unique()) <= 2**bits
            assert int(row.max()) - int(row.min()) < 2 ** max(bits, 8)
    assert (found.scales > 0).all()


@pytest.mark.parametrize(("method", "grid"), PAIRS, ids=ids)
def test_codes_scales_and_zeros_are_the_weight(method, grid):
    weight, inputs = layer(5, 32)
    weight[:, ::3] = 0.0
    found = sparity.quantize_weight(weight, inputs, method=method, grid=grid, group=group_of(method, 8))
    grid = grid if found.codebook is None else {"codebook": {"entries": found.codebook.tolist()}}
    assert (found.codebook is not None) == (method == WHOLE)
    chosen = registry.build("quantize.grid", grid)
    scales, zeros = (each.repeat_interleave(32 // each.shape[1], 1) for each in (found.scales, found.zeros))
    values = chosen.values(found.codes, scales, zeros)
    values = values if found.input_scales is None else values / found.input_scales
    torch.testing.assert_close(found.weight, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_method_that_says_so_is_never_further_from_the_dense_output_than_rounding(method, sparse, seed):
    if not registry.get("quantize.method", method).never_worse:
        assert method in (
            "gptq",
            "smoothquant",
            MIXED,
            WHOLE,
        )  # greedy, for inputs of few bits, greedy, of weights alone
        return
    weight, inputs = layer(6, 32, seed)
    inputs[..., seed] *= 20
    weight[:, ::2] *= not sparse
    for options in ({}, {"clip": True}) if method == "awq" else ({},):
        found = sparity.quantize_weight(weight, inputs, method=method, bits=3, group=8, **options)
        rounded = sparity.quantize_weight(weight, method="nearest", bits=3, group=8)
        errors = [references.output_error(weight, each.weight, inputs) for each in (found, rounded)]
        assert errors[0] <= errors[1] * (1 + 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dead", [slice(0, 8), slice(4, 30), slice(None)], ids=["some", "most", "all"])
@pytest.mark.parametrize("damping", [None, 0.0])
def test_channels_that_never_fired_are_rounded_as_they_are(method, dead, damping):
    """Other text may wake them: their weights go to the nearest value, whatever the method does elsewhere."""
    weight, inputs = layer(6, 32)
    inputs[..., dead] = 0.0
    known = registry.option_types(registry.get("quantize.method", method))
    options = {"damping": damping} if damping is not None and "damping" in known else {}
    found = sparity.quantize_weight(
        weight, inputs, method=method, bits=4, group=group_of(method, 32), symmetric=True, **options
    )
    assert found.weight.isfinite().all()
    if method == WHOLE:  # it reads no inputs
        assert torch.equal(found.weight, sparity.quantize_weight(weight, method=method, bits=4).weight)
        return
    steps = found.scales if found.input_scales is None else found.scales / found.input_scales[dead]
    assert ((found.weight - weight)[:, dead].abs() <= steps * 1.21).all()  # ranges may be narrowed by a tenth


@pytest.mark.parametrize("method", METHODS)
def test_a_method_asks_only_for_statistics_that_exist(method):
    assert set(registry.get("quantize.method", method).needs) <= set(registry.names("statistic"))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize("method", METHODS)
def test_zeros_of_every_pattern_survive_every_method(method, pattern):
    weight, inputs = layer(8, 32)
    pruned, keep = sparity.prune_weight(weight, inputs, score="wanda", pattern=pattern, solver="sparsegpt")
    found = sparity.quantize_weight(pruned, inputs, method=method, bits=4, group=group_of(method, 16))
    assert (found.weight[~keep] == 0).all()


@pytest.mark.parametrize("needs", [("mean_absolute",), ("max_absolute",)])
def test_what_scaling_reads_by_hand(needs):
    statistics = Statistics.gather("here", needs)
    statistics.add(torch.tensor([[[1.0, -4.0], [-3.0, 2.0]], [[0.0, 0.0], [0.0, 2.0]]]))
    expected = {"mean_absolute": [1.0, 2.0], "max_absolute": [3.0, 4.0]}
    assert statistics[needs[0]].tolist() == expected[needs[0]]
