"""The score jsq: by hand, against the published algorithm written plainly, and the ranges against whole products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
import sparity
from references import layer
from sparity import registry
from sparity.calibration import Statistics
from sparity.errors import InvalidInput
from sparity.static.prune.scores.jsq import limit_of, ranges_without

WEIGHT = torch.tensor([[2.0, -1.0]])
INPUTS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])


def scores(weight, inputs, **options):
    statistics = Statistics.gather("here", ["column_norm", "inputs"])
    statistics.add(inputs)
    return registry.create("prune.score", "jsq", options).score(weight, statistics)


def test_by_hand():
    """Without the first weight the outputs are 0, -2, -1, without the second 2, 0, 6."""
    found = scores(WEIGHT, INPUTS, rho=1.0, clamp=0.0)
    assert found[0].tolist() == pytest.approx([2 * 10**0.5 + 2, 5**0.5 + 6])


def test_clamping_by_hand():
    """Of six inputs a third is clamped: 3 becomes 2, the smallest of the two largest; 2, 0, 4 is left of 2, 0, 6."""
    assert limit_of(INPUTS, 1 / 3) == 2
    assert limit_of(INPUTS, 0.16) == float("inf")  # less than one of them
    found = scores(WEIGHT, INPUTS, rho=1.0, clamp=1 / 3)
    assert found[0].tolist() == pytest.approx([2 * 5**0.5 + 2, 5**0.5 + 4])


def published(weight, inputs, rho, clamp):
    """What the authors' code computes for one sequence `[tokens, in]`: a product for every input column."""
    count = int(clamp * inputs.numel())
    if count:
        limit = torch.topk(inputs.abs().flatten(), count).values[-1]
        inputs = torch.clamp(inputs, -limit, limit)
    return weight.abs() * references.input_norm(inputs[None]) + rho * published_ranges(weight, inputs)


def published_ranges(weight, inputs):
    ranges = torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        without = weight.clone()
        without[:, column] = 0
        outputs = inputs @ without.T
        ranges[:, column] = outputs.max(0).values - outputs.min(0).values
    return ranges


@pytest.mark.parametrize(("rho", "clamp"), [(2.1, 0.01), (2.1, 0.0), (0.3, 0.2), (0.0, 0.05)])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(9, 16, 40), (5, 63, 100), (1, 1, 1)])
def test_equal_to_the_published_algorithm_on_one_sequence(rho, clamp, rows, columns, tokens):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator).exp()
    expected = published(weight.double(), inputs.double(), rho, clamp)
    torch.testing.assert_close(scores(weight, inputs, rho=rho, clamp=clamp).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_range_counts_by_the_root_of_the_number_of_sequences():
    """Four times the same sequence: the norms are those of one, the range weighs half as much."""
    weight, inputs = layer(5, 16)[0], torch.randn(4, 1, 30, 16, generator=torch.Generator().manual_seed(0))[0]
    once = scores(weight, inputs, rho=1.0, clamp=0.0)
    again = scores(weight, inputs.expand(4, -1, -1), rho=2.0, clamp=0.0)
    torch.testing.assert_close(once, again)


whole = st.integers(-4, 4)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
def test_the_ranges_are_those_of_the_outputs_without_each_weight(data, rows, columns, tokens):
    """Whole numbers are exact in float32, ties and zeros among them."""
    weight = torch.tensor(data.draw(st.lists(whole, min_size=rows * columns, max_size=rows * columns)))
    inputs = torch.tensor(data.draw(st.lists(whole, min_size=tokens * columns, max_size=tokens * columns)))
    weight, inputs = weight.view(rows, columns).float(), inputs.view(tokens, columns).float()
    assert torch.equal(ranges_without(weight, inputs), published_ranges(weight, inputs))


def test_without_range_and_clamping_it_is_wanda_also_where_only_a_sample_is_known():
    weight, _ = layer(9, 24)
    inputs = torch.randn(4, 700, 24, generator=torch.Generator().manual_seed(1))
    wanda = sparity.prune_weight(weight, inputs, score="wanda")[1]
    assert torch.equal(sparity.prune_weight(weight, inputs, score="jsq", rho=0.0, clamp=0.0)[1], wanda)
    assert not torch.equal(sparity.prune_weight(weight, inputs, score="jsq")[1], wanda)


def test_a_weight_that_holds_the_extremes_apart_goes_sooner():
    """Both inputs have one norm; the first is large where the output is largest and smallest, the second elsewhere."""
    weight = torch.tensor([[1.0, 1.0, 5.0]])
    inputs = torch.tensor([[3.0, 0.0, 2.0], [-3.0, 0.0, -2.0], [0.0, 3.0, -1.0], [0.0, -3.0, 1.0]])
    found = scores(weight, inputs, clamp=0.0)[0]
    assert found[0] < found[1]


def test_a_dead_channel_scores_zero_and_one_that_the_sample_missed_does_not():
    weight = torch.ones(1, 3)
    statistics = Statistics.gather("here", ["column_norm", "inputs"])
    statistics.add(torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]))
    statistics.sums["column_norm"][2] = 4.0  # other tokens, which are not of the sample
    found = registry.build("prune.score", {"jsq": {"rho": 0.0}}).score(weight, statistics)[0]
    assert found.tolist() == pytest.approx([5**0.5, 0, 2])
    assert found[1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1.0}, r"rho -1\.0: the weight of the range must be finite and not negative"),
        ({"rho": float("inf")}, "must be finite"),
        ({"clamp": 1.0}, r"clamp 1\.0: it is the share of the inputs that is clamped, in \[0, 1\)"),
        ({"clamp": -0.1}, r"in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InvalidInput, match=message):
        sparity.prune_weight(WEIGHT, INPUTS, score="jsq", **options)


def test_inputs_are_needed():
    with pytest.raises(InvalidInput, match="needs the statistics column_norm, inputs: pass `inputs`"):
        sparity.prune_weight(WEIGHT, score="jsq")
