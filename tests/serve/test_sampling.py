"""Which token is chosen: by hand, and over many draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparity.errors import NumericalError
from sparity.serve.sampling import Chooser, Sampling

SHARES = torch.tensor([0.1, 0.4, 0.2, 0.3])
LOGITS = SHARES.log()


def often(sampling, prompt=(), times=4000):
    """How often each token is drawn, the choices before forgotten."""
    counts = torch.zeros(4)
    for seed in range(times):
        counts[Chooser(Sampling(**{**vars(sampling), "seed": seed}), prompt).choose(LOGITS)] += 1
    return counts / times


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"min_p": 0.45}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"logit_bias": ((0, 100.0),)}, [1, 0, 0, 0]),
        ({"temperature": 1e-300}, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(options, expected):
    assert often(Sampling(**options)).tolist() == pytest.approx(expected, abs=0.03)


def test_penalties():
    greedy = {"temperature": 0.0}
    assert Chooser(Sampling(**greedy), ()).choose(LOGITS) == 1
    twice = Chooser(Sampling(**greedy, presence_penalty=0.5), ())
    assert [twice.choose(LOGITS) for _ in range(3)] == [1, 3, 1]  # log 0.4 - 0.5 < log 0.3; both punished alike
    often = Chooser(Sampling(**greedy, frequency_penalty=0.3), ())
    assert [often.choose(LOGITS) for _ in range(4)] == [1, 3, 1, 3]
    positive = torch.tensor([1.0, 2.0, -1.0, -0.5])
    assert Chooser(Sampling(**greedy, repetition_penalty=2.5), (1,)).choose(positive) == 0
    assert Chooser(Sampling(**greedy, repetition_penalty=2.5), (3,)).choose(-positive.abs()) == 0
    assert LOGITS.equal(SHARES.log())


def test_a_tie_goes_to_the_first_and_banned_tokens_are_not_chosen():
    tie = torch.tensor([0.0, 5.0, 5.0])
    assert Chooser(Sampling(temperature=0), ()).choose(tie) == 1
    assert Chooser(Sampling(temperature=0), ()).choose(tie, {1}) == 2
    assert {Chooser(Sampling(seed=seed), ()).choose(tie, {1, 2}) for seed in range(9)} == {0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(bad):
    with pytest.raises(NumericalError, match="NaN or infinite"):
        Chooser(Sampling(), ()).choose(torch.tensor([0.0, bad]))


@settings(max_examples=30, deadline=None)
@given(st.integers(-(2**70), 2**70), st.floats(0.01, 3))
def test_a_seed_gives_the_same_tokens_again(seed, temperature):
    sampling = Sampling(seed=seed, temperature=temperature)
    first, second = Chooser(sampling, ()), Chooser(sampling, ())
    assert [first.choose(LOGITS) for _ in range(8)] == [second.choose(LOGITS) for _ in range(8)]
