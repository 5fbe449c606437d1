"""Each method of activation sparsity on numbers small enough to check by eye."""

import math

import pytest
import torch

import sparity
from sparity.dynamic.activations.methods.plan_quantile import at_or_above
from sparity.dynamic.activations.quantiles import densest, interpolated_quantile, just_below, quantile
from sparity.errors import InvalidInput

X = torch.tensor([[8.0, -1.0, 0.5, 4.0], [-2.0, 3.0, 0.25, -0.125]])  # [tokens, in]
WEIGHT = torch.tensor([[3.0, 0.0, 0.0, 1.0], [4.0, 1.0, 8.0, 0.0]])  # column norms 5, 1, 8, 1
PARTNER = torch.tensor([[1.0, -4.0, 16.0, 0.0], [-1.0, 4.0, 16.0, 2.0]])  # means of magnitude 1, 4, 16, 1


def marks(mask):
    return ["".join("x" if counts else "." for counts in row) for row in mask.tolist()]


@pytest.mark.parametrize(
    ("method", "options", "sparsity", "expected"),
    [
        # sizes 8 1 .5 4 / 2 3 .25 .125: four of eight lie at 1 or below
        ("teal", {}, 0.5, ["x..x", "xx.."]),
        ("cats", {}, 0.5, ["x..x", "xx.."]),  # quantile 1.5, between 1 and 2
        ("cats", {}, 3 / 7, ["xx.x", "xx.."]),  # quantile 1, at which a neuron counts
        ("cats", {"reference": True}, 0.4, ["xx.x", "xx.."]),  # passed in the bin of 1, whose edge is below it
        ("cats", {"reference": True}, 0.5, ["x..x", "xx.."]),  # passed in the last bin, from 2 on
        # times 1 4 16 1: 8 4 8 4 / 2 12 4 .125; 4 of the 8 at 4 or below, and what equals 4
        ("chess", {}, 0.5, ["x.x.", ".x.."]),
        # times 5 1 8 1: 40 1 4 4 / 10 3 2 .125: per token the two largest, the first of equal ones
        ("wina", {}, 0.5, ["x.x.", "xx.."]),
        ("wina", {}, 0.75, ["x...", "x..."]),
        ("plan_importance", {}, 0.5, ["x.x.", "xx.."]),
        ("plan_importance", {"quantile": "static"}, 0.5, ["x.xx", "x..."]),  # 3 and below go
        ("plan_quantile", {}, 0.5, ["x..x", "xx.."]),
        ("plan_quantile", {}, 0.34, ["x..x", "xx.."]),  # place 1.02 of 0 to 3: two are above
        ("plan_quantile", {}, 1 / 3, ["xx.x", "xxx."]),  # place 1: the number there counts
        # over rms sqrt(81.25/4) = 4.507, sqrt(13.078/4) = 1.808: 1.77 .22 .11 .89 / 1.11 1.66 .14 .07
        ("rms", {}, 0.5, ["x..x", "xx.."]),
        ("rms", {}, 0.625, ["x...", "xx.."]),
        ("scap", {"centre": "zero"}, 0.5, ["x..x", "xx.."]),
        # lower median .25: 7.75 1.25 .25 3.75 / 2.25 2.75 0 .375; the middle of 1.25 and 2.25 is 1.75
        ("scap", {"centre": "median"}, 0.5, ["x..x", "xx.."]),
        ("scap", {"centre": "median"}, 0.25, ["xx.x", "xx.x"]),  # .34: -0.125 counts, 0.5 and 0.25 do not
    ],
)
def test_a_mask_worked_by_hand(method, options, sparsity, expected):
    mask = sparity.activation_mask(X, WEIGHT, method=method, sparsity=sparsity, partner=PARTNER, **options)
    assert marks(mask) == expected


def test_a_threshold_of_chess_is_the_quantile_over_the_mean_partner():
    fitted = sparity.fit_activations(X, method="chess", sparsity=0.5, partner=PARTNER)
    assert fitted.threshold.tolist() == [4.0, 1.0, 0.25, 4.0]
    dead = PARTNER * torch.tensor([1.0, 0.0, 1.0, 1.0])
    fitted = sparity.fit_activations(X, method="chess", sparsity=0.5, partner=dead)
    assert fitted.threshold[1] == math.inf  # a neuron that nothing comes of is never computed
    assert not fitted.keep(X)[:, 1].any()


def test_chess_without_the_partner_says_what_to_give():
    with pytest.raises(InvalidInput, match=r"what the activations are multiplied with.*give it"):
        sparity.activation_mask(X, method="chess", sparsity=0.5)


@pytest.mark.parametrize("method", ["wina", "plan_importance"])
def test_a_method_that_weighs_by_the_weight_asks_for_it(method):
    with pytest.raises(InvalidInput, match="weighs channels by the weight: give it"):
        sparity.activation_mask(X, method=method, sparsity=0.5)


def test_statistical_top_k_worked_by_hand():
    x = torch.tensor([[1.0, -3.0, 1.0, -3.0], [10.0, 30.0, -10.0, 10.0]])
    # sizes: mean 2 std 1; mean 15 std 8.66. Standard scores -1 1 -1 1 / -.58 1.73 -.58 -.58
    mask = sparity.activation_mask(x, method="statistical_topk", sparsity=0.5, reference=False)
    assert marks(mask) == [".x.x", ".x.."]  # the fourth lowest score is -.58: what is above counts
    # signed: mean -1 std 2, mean 10 std 14.14; Phi^-1(.75) = .674: limits .349 and 19.5
    for options in ({}, {"reference": True}):
        mask = sparity.activation_mask(x, method="statistical_topk", sparsity=0.75, **options)
        assert marks(mask) == ["x.x.", ".x.."]


def test_wina_rounds_as_the_authors_do_or_exactly():
    x, weight = torch.arange(1.0, 11.0)[None], torch.eye(10)
    for sparsity, exact, reference in ((0.8, 2, 1), (0.5, 5, 5), (0.37, 6, 6), (0.9, 1, 1)):
        masks = [
            sparity.activation_mask(x, weight, method="wina", sparsity=sparsity, reference=flag)
            for flag in (False, True)
        ]
        assert [int(mask.sum()) for mask in masks] == [exact, reference]  # 10 * (1 - 0.8) is 1.9999999999999996


def test_scap_fills_in_its_centre():
    x = torch.cat([torch.full((90,), 5.0) + torch.linspace(-0.1, 0.1, 90), torch.linspace(-40, 40, 10)])[None]
    fitted = sparity.fit_activations(x, method="scap", sparsity=0.9)
    assert fitted.centre.unique().numel() == 1
    assert float(fitted.centre[0]) == pytest.approx(5.0, abs=0.3)
    assert fitted.keep(x)[0, :90].sum() == 0
    assert sparity.fit_activations(x, method="scap", sparsity=0.9, centre="zero").centre is None


def test_teal_refuses_the_authors_tails_of_too_few_numbers():
    with pytest.raises(InvalidInput, match=r"needs 100 numbers or more.*got 8"):
        sparity.activation_mask(X, method="teal", sparsity=0.5, reference=True)


def test_quantiles_worked_by_hand():
    scores = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert [float(quantile(scores, share)) for share in (0.01, 0.25, 0.26, 0.5, 1.0)] == [1, 1, 2, 2, 4]
    assert [float(interpolated_quantile(scores, share)) for share in (0.0, 0.5, 1 / 3, 0.9)] == [
        1,
        2.5,
        2,
        pytest.approx(3.7),
    ]
    limits = just_below(torch.tensor([1.0, 0.0, math.inf]))
    assert limits[0] < 1.0 <= float(torch.nextafter(limits[0], torch.tensor(2.0)))
    assert limits[1:].tolist() == [0.0, math.inf]
    assert [at_or_above(5, share) for share in (0.1, 0.25, 0.26, 0.5, 0.99)] == [4, 4, 3, 3, 1]


def test_the_densest_point():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, generator=generator)
    assert densest(normal * 0.5 + 3) == pytest.approx(3, abs=0.1)
    assert densest(torch.cat([normal, normal[:12_000] * 0.1 + 6])) == pytest.approx(6, abs=0.1)
    assert densest(torch.full((5,), 2.5)) == 2.5
    assert densest(torch.tensor([7.0])) == 7.0
    outlier = torch.cat([normal, torch.tensor([300.0])])
    assert densest(outlier, 2000, 0.5, tails=0.0) == pytest.approx(0, abs=0.3)
