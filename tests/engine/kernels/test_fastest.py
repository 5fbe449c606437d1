"""The format for speed: what competes, and that dense stays where nothing wins clearly."""

import pytest
import torch

from kernel_inputs import weight_for
from sparity.engine.kernels import native
from sparity.engine.kernels.fastest import fastest_format

NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}")
SHAPE = (64, 512)
pytestmark = pytest.mark.usefixtures("small_ones_too")


def clock(**times):
    """Times of formats; of a format's own routes the compiled one is the fastest."""

    def timer(calls):
        for call in calls.values():
            call()
        every = {"gemv": 1.0, "prefill": 2.0, "pytorch": 2.0, **times}
        return {name: every[name] for name in calls}

    return timer


def lost(found):
    return {candidate.name: candidate.lost for candidate in found.choice.candidates}


@NATIVE
@pytest.mark.parametrize(
    ("dense", "bitmask", "winner"),
    [(1.0, 0.5, "bitmask"), (1.0, 0.98, "dense"), (1.0, 1.3, "dense"), (1.04, 1.0, "bitmask")],
)
def test_a_sparse_format_must_win_clearly(dense, bitmask, winner):
    found = fastest_format(weight_for("bitmask", *SHAPE), timer=clock(dense=dense, bitmask=bitmask))
    assert found.format.name == found.choice.winner == winner
    assert found.choice.timed
    assert found.case.format == "dense/bitmask"
    assert lost(found)["two_of_four"] == "cannot hold this mask"
    assert lost(found)["block"] == "the zeros do not lie in blocks"


@NATIVE
@pytest.mark.parametrize(
    ("pattern", "formats"), [("two_of_four", "dense/bitmask/two_of_four"), ("block", "dense/bitmask/block")]
)
def test_a_pattern_lets_its_format_compete(pattern, formats):
    times = {"dense": 3.0, "bitmask": 2.0, pattern: 1.0}
    found = fastest_format(weight_for(pattern, *SHAPE), timer=clock(**times))
    assert found.format.name == pattern
    assert found.case.format == formats
    assert lost(found)["bitmask"] == "2.00x the time"


@NATIVE
def test_int8_competes_with_int8():
    found = fastest_format(weight_for("block", *SHAPE), "int8", clock(dense=1.0, bitmask=0.5))
    assert found.format.name == "bitmask"
    assert found.case.values == "int8"
    assert lost(found)["block"] == "no kernel for the format block with int8 values"


@NATIVE
def test_weights_of_one_case_are_timed_once():
    found = fastest_format(weight_for("bitmask", *SHAPE), timer=clock(dense=2.0, bitmask=1.0))
    other = weight_for("bitmask", *SHAPE, seed=7, keep=0.51)
    assert fastest_format(other, timer=clock(dense=1.0, bitmask=2.0)) == found
    denser = weight_for("bitmask", *SHAPE, keep=0.6)
    assert fastest_format(denser, timer=clock(dense=1.0, bitmask=2.0)).format.name == "dense"


def test_without_a_kernel_dense_is_the_only_one():
    found = fastest_format(weight_for("bitmask", *SHAPE).float(), timer=clock())
    assert found.format.name == "dense"
    assert found.choice.how == "the only candidate"
    assert lost(found)["bitmask"]


@NATIVE
@pytest.mark.parametrize(("keep", "winner"), [(0.3, "bitmask"), (0.6, "bitmask"), (0.75, "dense"), (1.0, "dense")])
def test_the_rule_where_nothing_is_timed(keep, winner):
    """At most three quarters of dense's bytes: density + 1/16 for the masks."""
    found = fastest_format(weight_for("bitmask", *SHAPE, keep=keep))  # SPARITY_CHOICE=rules
    assert found.format.name == winner
    assert not found.choice.timed


@NATIVE
@pytest.mark.parametrize("pattern", ["dense", "block"])
def test_what_is_no_smaller_than_dense_is_not_timed(pattern):
    found = fastest_format(weight_for(pattern, *SHAPE, keep=1.0), timer=clock())
    assert found.format.name == "dense"
    assert found.case.format == "dense"
    assert lost(found)["bitmask"] == lost(found)["block"] == "takes no fewer bytes than dense"


def test_a_matrix_of_zeros():
    assert fastest_format(torch.zeros(8, 64).bfloat16()).case.density == 0
