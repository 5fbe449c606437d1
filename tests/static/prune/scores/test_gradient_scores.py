"""The scores that read gradients, and obd, worked by hand."""

import pytest
import torch

import sparity
from sparity import registry
from sparity.calibration import Statistics
from sparity.errors import InvalidInput, NumericalError

WEIGHT = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
# over the two samples: means [[2, 1], [0, -3]], mean squares [[4, 5], [1, 9]]
GRADIENTS = torch.tensor([[[2.0, 3.0], [1.0, -3.0]], [[2.0, -1.0], [-1.0, -3.0]]])
INPUTS = torch.tensor([[3.0, 0.0], [4.0, 2.0]])  # one sequence: norms 5 and 2


def scores(name, gradients=GRADIENTS):
    """What the score itself says, on statistics made as `prune_weight` makes them."""
    statistics = Statistics.gather("here", ["column_norm"])
    statistics.add(INPUTS)
    squares = gradients.square().mean(0)
    known = {"gradient": gradients.mean(0), "gradient_square": squares, "regional_gradient_square": squares}
    return registry.build("prune.score", name).score(WEIGHT, statistics.with_gradients(known)).tolist()


def test_gradient_by_hand():
    assert scores("gradient") == [[2.0, 2.0], [0.0, 1.5]]


def test_fisher_by_hand():
    assert scores("fisher") == [[2.0, 10.0], [4.5, 1.125]]  # 1*4/2, 4*5/2, 9*1/2, 0.25*9/2


def test_taylor_by_hand():
    assert scores("taylor") == [[0.0, 12.0], [4.5, 2.625]]  # |2 - 2|, |-2 - 10|, |0 - 4.5|, |-1.5 - 1.125|


def test_obd_by_hand():
    assert scores("obd") == [[25.0, 16.0], [225.0, 1.0]]  # norm^2 w^2: 25*1, 4*4, 25*9, 4*0.25


@pytest.mark.parametrize("name", ["gblm", "wanda_plus_plus"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 100.0])
def test_the_blends_by_hand(name, alpha):
    root = 5**0.5
    expected = [[alpha * 2 + 5, 2 * (alpha * root + 2)], [3 * (alpha + 5), 0.5 * (alpha * 3 + 2)]]
    assert scores({name: {"alpha": alpha}}) == [pytest.approx(row) for row in expected]


def kept(score, **arguments):
    return sparity.prune_weight(WEIGHT, score=score, count="exact", sparsity=0.5, **arguments)[1].tolist()


def test_prune_weight_takes_one_gradient_or_one_per_sample():
    assert kept("fisher", gradients=GRADIENTS) == [[False, True], [True, False]]
    assert kept("fisher", gradients=GRADIENTS[0]) == [[False, True], [True, False]]  # 2, 18, 4.5, 1.125
    assert kept("gradient", gradients=GRADIENTS[:1]) == kept("gradient", gradients=GRADIENTS[0])
    assert kept("gradient", gradients=GRADIENTS) == [[True, True], [False, False]]  # 2, 2, 0, 1.5
    assert kept("taylor", gradients=GRADIENTS) == [[False, True], [True, False]]
    assert kept("obd", inputs=INPUTS) == [[True, False], [True, False]]
    rows = sparity.prune_weight(WEIGHT, INPUTS, gradients=GRADIENTS, score="gblm", sparsity=0.5)[1]
    assert rows.tolist() == [[False, True], [True, False]]


def test_groups():
    for name, group in {
        "gradient": "layer",
        "fisher": "layer",
        "taylor": "layer",
        "obd": "layer",
        "gblm": "row",
        "wanda_plus_plus": "row",
    }.items():
        assert registry.get("prune.score", name).compare_within == group


def test_gblm_without_gradient_is_wanda_and_obd_within_rows_too():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(9, 24, generator=generator), torch.randn(2, 40, 24, generator=generator)
    gradients = torch.randn(3, 9, 24, generator=generator)
    wanda = sparity.prune_weight(weight, inputs)[1]
    assert torch.equal(wanda, sparity.prune_weight(weight, inputs, gradients=gradients, score="gblm", alpha=0.0)[1])
    assert torch.equal(wanda, sparity.prune_weight(weight, inputs, score="obd", compare_within="row")[1])
    assert not torch.equal(wanda, sparity.prune_weight(weight, inputs, gradients=gradients, score="gblm")[1])


def test_taylor_is_the_change_of_a_quadratic_loss():
    """L(w) = sum a w^2 / 2 + b w has g = a w + b; with h in place of E[g^2], |L(w without one) - L(w)| is the score."""
    weight, a = torch.tensor([[1.5, -0.5]], dtype=torch.float64), torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([[0.25, 1.0]], dtype=torch.float64)

    def loss(w):
        return (a * w**2 / 2 + b * w).sum()

    without = [loss(weight * keep) for keep in (torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))]
    known = {"gradient": a * weight + b, "gradient_square": a}
    statistics = Statistics.gather("here", []).with_gradients(known)
    found = registry.build("prune.score", "taylor").score(weight, statistics)[0]
    assert found.tolist() == pytest.approx([abs(float(w - loss(weight))) for w in without])


def test_what_is_missing_is_named():
    with pytest.raises(InvalidInput, match=r"gradient, 50%.* needs the statistics gradient: pass `gradients`"):
        sparity.prune_weight(WEIGHT, INPUTS, score="gradient")
    with pytest.raises(InvalidInput, match="needs the statistics gradient_square: pass `gradients`"):
        sparity.prune_weight(WEIGHT, INPUTS, score="gblm")
    with pytest.raises(InvalidInput, match="needs the statistics column_norm: pass `inputs`"):
        sparity.prune_weight(WEIGHT, gradients=GRADIENTS, score="gblm")
    with pytest.raises(InvalidInput, match=r"gradients must be \[2, 2\] or \[samples, 2, 2\], got \[0, 2, 2\]"):
        sparity.prune_weight(WEIGHT, gradients=GRADIENTS[:0], score="fisher")
    with pytest.raises(NumericalError, match="gradients holds NaN"):
        sparity.prune_weight(WEIGHT, gradients=GRADIENTS / 0, score="fisher")
    with pytest.raises(InvalidInput, match=r"alpha -1\.0: the weight of the gradient"):
        sparity.prune_weight(WEIGHT, INPUTS, gradients=GRADIENTS, score="gblm", alpha=-1.0)


def test_gradients_share_the_sums():
    statistics = Statistics.gather("here", ["column_norm", "gram"])
    statistics.add(INPUTS)
    known = statistics.with_gradients({"gradient": GRADIENTS[0]})
    assert known.gram is statistics.gram
    assert known.inverse_factor()[0] is statistics.inverse_factor()[0]  # factorised once for all that share the input
    assert known.gradient is GRADIENTS[0] or torch.equal(known.gradient, GRADIENTS[0])
    with pytest.raises(InvalidInput, match='"gradient_square" was not gathered'):
        _ = known.gradient_square
    with pytest.raises(InvalidInput, match='"gradient" was not gathered'):
        _ = statistics.gradient
