import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
import sparity
from references import layer
from sparity.errors import InvalidInput, NumericalError

SHAPES = ((8, 16), (5, 24), (33, 64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.99])
def test_magnitude_equals_the_reference(shape, sparsity):
    weight, _ = layer(*shape)
    pruned, keep = sparity.prune_weight(weight, score="magnitude", sparsity=sparsity)
    assert torch.equal(keep, references.magnitude(weight, sparsity))
    assert torch.equal(pruned, torch.where(keep, weight, 0.0))
    assert int((~keep).sum()) == int(weight.numel() * sparsity) + 1


def test_magnitude_prunes_all_ties_at_the_threshold_and_exact_count_does_not():
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 3.0, 4.0, 5.0]])
    _, keep = sparity.prune_weight(weight, score="magnitude", sparsity=0.25)
    assert keep.tolist() == [[False] * 4, [True] * 4]
    _, keep = sparity.prune_weight(weight, score="magnitude", sparsity=0.25, count="exact")
    assert keep.tolist() == [[False, False, True, True], [True] * 4]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7])
def test_wanda_equals_the_reference(shape, sparsity):
    weight, inputs = layer(*shape)
    pruned, keep = sparity.prune_weight(weight, inputs, sparsity=sparsity)
    assert torch.equal(keep, references.wanda(weight, inputs, sparsity))
    assert torch.equal(pruned, torch.where(keep, weight, 0.0))
    assert ((~keep).sum(1) == int(shape[1] * sparsity)).all()


def test_wanda_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    inputs = torch.tensor([[3.0, 0.0, 0.1, 0.0], [4.0, 1.0, 0.0, 20.0]])  # norms 5, 1, 0.1, 20
    _, keep = sparity.prune_weight(weight, inputs)  # scores 5, 2, 0.3, 10
    assert keep.tolist() == [[True, False, False, True]]


def test_wanda_breaks_ties_by_column():
    weight, inputs = torch.ones(1, 4), torch.eye(4)
    _, keep = sparity.prune_weight(weight, inputs)
    assert keep.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("kept_of", [(2, 4), (1, 4), (4, 8), (3, 8), (1, 1)])
def test_n_of_m_keeps_n_of_every_m(kept_of):
    weight, inputs = layer(6, 24)
    pattern = f"{kept_of[0]}:{kept_of[1]}"
    _, keep = sparity.prune_weight(weight, inputs, pattern=pattern)
    metric = weight.abs() * references.input_norm(inputs)
    assert torch.equal(keep, references.n_of_m(metric, *kept_of))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_sparsegpt_equals_the_reference(sparsity):
    weight, inputs = layer(12, 160, tokens=100)  # more than one lazy block
    pruned, keep = sparity.prune_weight(weight, inputs, solver="sparsegpt", sparsity=sparsity)
    expected, expected_keep = references.sparsegpt(weight, inputs, sparsity)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept_of", [(2, 4), (4, 8)])
def test_sparsegpt_n_of_m_equals_the_reference(kept_of):
    weight, inputs = layer(9, 144, tokens=100)
    pruned, keep = sparity.prune_weight(weight, inputs, solver="sparsegpt", pattern=f"{kept_of[0]}:{kept_of[1]}")
    expected, expected_keep = references.sparsegpt(weight, inputs, pattern=kept_of)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-5)


def test_sparsegpt_keeps_the_mask_of_another_score_and_compensates():
    weight, inputs = layer(10, 40)
    pruned, keep = sparity.prune_weight(weight, inputs, score="wanda", solver="sparsegpt", sparsity=0.5)
    assert torch.equal(keep, references.wanda(weight, inputs, 0.5))
    expected, _ = references.sparsegpt(weight, inputs, mask=keep)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-5)
    masked = torch.where(keep, weight, 0.0)
    assert references.output_error(weight, pruned, inputs) < 0.95 * references.output_error(weight, masked, inputs)


def test_lazy_blocks_of_any_width_give_the_same_compensation():
    weight, inputs = layer(7, 50)
    results = [
        sparity.prune_weight(weight, inputs, score="wanda", solver="sparsegpt", block_columns=width)[0]
        for width in (1, 7, 50, 128)
    ]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)


def test_least_squares_is_the_bound_that_sparsegpt_approaches():
    """Columns before a pruned one are no longer free, so SparseGPT lies between zeroing and the optimum."""
    weight, inputs = layer(6, 32)
    pruned, keep = sparity.prune_weight(weight, inputs, solver="sparsegpt", damping=0.0)
    best = references.output_error(weight, references.least_squares(weight, inputs, keep), inputs)
    solved = references.output_error(weight, pruned, inputs)
    zeroed = references.output_error(weight, torch.where(keep, weight, 0.0), inputs)
    assert best <= solved * (1 + 1e-6)
    assert solved < zeroed
    first_only = keep.clone()
    first_only[:, 1:] = True
    first_only[:, 0] = False  # with only the first column gone nothing is fixed too early: both agree
    expected = references.least_squares(weight, inputs, first_only)
    column = references.sparsegpt(weight, inputs, mask=first_only, damping=0.0)[0]
    torch.testing.assert_close(column, expected, rtol=1e-6, atol=1e-8)


def test_a_channel_that_never_fired_is_pruned_first():
    weight, inputs = layer(4, 8)
    inputs[..., 3] = 0.0
    weight[:, 3] = 100.0
    pruned, keep = sparity.prune_weight(weight, inputs, solver="sparsegpt", sparsity=0.3)
    assert not keep[:, 3].any()
    assert (pruned[:, 3] == 0).all()


def test_a_weight_that_reads_zeros_and_is_kept_all_the_same_stays_what_it_was():
    weight, inputs = layer(4, 8)
    inputs[..., 3] = 0.0
    weight[:, 3] = 100.0
    pruned, keep = sparity.prune_weight(weight, inputs, score="magnitude", solver="sparsegpt", sparsity=0.3)
    assert keep[:, 3].all()
    assert (pruned[:, 3] == 100).all()
    nothing, kept = sparity.prune_weight(weight, torch.zeros_like(inputs), solver="sparsegpt", compare_within="row")
    assert torch.equal(nothing, torch.where(kept, weight, 0.0))
    assert kept.tolist() == [[False] * 4 + [True] * 4] * 4


def test_block_by_hand():
    weight = torch.tensor([[1.0, 1.0, 9.0, 0.0], [1.0, 1.0, 0.0, 0.0], [5.0, 5.0, 2.0, 2.0], [5.0, 5.0, 2.0, 2.0]])
    _, keep = sparity.prune_weight(weight, score="magnitude", pattern="block:2x2", sparsity=0.5)
    assert keep.tolist() == [[False, False, True, True]] * 2 + [[True, True, False, False]] * 2  # sums 4, 9, 20, 8


def test_a_matrix_of_tokens_is_one_sequence():
    weight, inputs = layer(6, 16, samples=1)
    three = sparity.prune_weight(weight, inputs, solver="sparsegpt")
    two = sparity.prune_weight(weight, inputs[0], solver="sparsegpt")
    assert torch.equal(three[0], two[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_weight_is_kept_and_arguments_are_not_changed(dtype):
    weight, inputs = layer(8, 16)
    weight = weight.to(dtype)
    copy = weight.clone()
    pruned, keep = sparity.prune_weight(weight, inputs, solver="sparsegpt")
    assert pruned.dtype == dtype
    assert keep.dtype == torch.bool
    assert torch.equal(weight, copy)


def test_sparsity_zero_keeps_everything():
    weight, inputs = layer(8, 16)
    for options in ({}, {"score": "magnitude"}, {"solver": "sparsegpt"}, {"pattern": "block:4x4"}):
        pruned, keep = sparity.prune_weight(weight, inputs, sparsity=0.0, **options)
        assert keep.all()
        assert torch.equal(pruned, weight)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 40),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(0, 1000),
    solver=st.sampled_from(["mask_only", "sparsegpt"]),
    group=st.sampled_from(["row", "layer"]),
)
def test_masks_hold_and_survive(rows, columns, sparsity, seed, solver, group):
    weight, inputs = layer(rows, columns, seed, tokens=columns + 2)
    pruned, keep = sparity.prune_weight(
        weight, inputs, score="wanda", solver=solver, sparsity=sparsity, compare_within=group
    )
    assert (pruned[~keep] == 0).all()
    assert not torch.signbit(pruned[~keep]).any()
    if group == "row":
        assert ((~keep).sum(1) == int(columns * sparsity)).all()
    elif sparsity > 0:
        assert int((~keep).sum()) == int(rows * columns * sparsity) + 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"score": "wnda"}, 'did you mean "wanda"'),
        ({"solver": "sparsegtp"}, 'did you mean "sparsegpt"'),
        ({"pattern": "blok"}, "N kept of M"),
        ({"pattern": "5:4"}, "1 <= N <= M"),
        ({"pattern": "0:4"}, "1 <= N <= M"),
        ({"pattern": "block:0x4"}, "at least one row"),
        ({"pattern": "3:5"}, "5 does not divide its 16 input columns"),
        ({"pattern": "block:3x4"}, "do not divide its shape 8x16"),
        ({"pattern": "2:4", "sparsity": 0.6}, "contradicts the pattern"),
        ({"sparsity": 1.0}, "must lie in [0, 1)"),
        ({"sparsity": -0.1}, "must lie in [0, 1)"),
        ({"sparsity": float("nan")}, "must lie in [0, 1)"),
        ({"sparsity": True}, "must lie in [0, 1)"),
        ({"compare_within": "rows"}, 'did you mean "row"'),
        ({"dampin": 0.1, "solver": "sparsegpt"}, 'did you mean "damping"'),
        ({"damping": "much", "solver": "sparsegpt"}, "expected float"),
        ({"damping": -1.0, "solver": "sparsegpt"}, "must lie in [0, 1]"),
        ({"block_columns": 0, "solver": "sparsegpt"}, "at least 1"),
        ({"count": "some", "score": "magnitude"}, "'reference' or 'exact'"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, words):
    weight, inputs = layer(8, 16)
    with pytest.raises(InvalidInput) as caught:
        sparity.prune_weight(weight, inputs, **arguments)
    assert words in str(caught.value)


def test_bad_tensors():
    weight, inputs = layer(8, 16)
    with pytest.raises(InvalidInput, match="needs the statistics column_norm: pass `inputs`"):
        sparity.prune_weight(weight)
    with pytest.raises(InvalidInput, match=r"must be \[tokens, 16\]"):
        sparity.prune_weight(weight, inputs[..., :8])
    with pytest.raises(InvalidInput, match="floating-point matrix"):
        sparity.prune_weight(weight[0], inputs)
    with pytest.raises(InvalidInput, match="floating-point matrix"):
        sparity.prune_weight(weight.int(), inputs)
    with pytest.raises(InvalidInput, match=r"gradients must be \[8, 16\]"):
        sparity.prune_weight(weight, inputs, gradients=weight.T)
    broken = weight.clone()
    broken[1, 2] = torch.nan
    with pytest.raises(NumericalError, match="weight holds NaN"):
        sparity.prune_weight(broken, inputs)
    with pytest.raises(NumericalError, match="inputs holds NaN"):
        sparity.prune_weight(weight, inputs / 0)


def test_a_singular_gram_is_damped_more_and_said_so(caplog):
    weight, _ = layer(8, 16)
    inputs = torch.ones(1, 4, 16)  # rank 1
    pruned, _ = sparity.prune_weight(weight, inputs, solver="sparsegpt", damping=0.0)
    assert torch.isfinite(pruned).all()
    assert "singular with damping 0, trying 0.01" in caplog.text
