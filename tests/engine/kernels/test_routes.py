"""What multiplies a prepared weight: the routes on offer, the timed winner, and the results of each."""

from types import SimpleNamespace

import pytest
import torch

from kernel_inputs import inputs, weight_for
from sparity.engine.kernels import choice_file, native, prepare
from sparity.engine.kernels.gemv import cpu, reference
from sparity.errors import CorruptFile
from sparity.formats import build_format

NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}")
SHAPE = (70, 130)
pytestmark = pytest.mark.usefixtures("small_ones_too")


class Clock:
    """Times by candidate; `asked` are the candidates of each timing, all of them called."""

    def __init__(self, **times):
        self.times, self.asked = times, []

    def __call__(self, calls):
        self.asked.append(list(calls))
        assert all(call().shape[1] == SHAPE[0] for call in calls.values())
        return {name: self.times[name] for name in calls}


def packed(name, values="same", dtype=torch.bfloat16):
    return build_format(name).pack(weight_for(name, *SHAPE).to(dtype), values)


@NATIVE
@pytest.mark.parametrize(
    ("name", "values", "few", "many"),
    [
        ("dense", "same", ["gemv", "pytorch"], "pytorch"),
        ("dense", "int8", ["gemv", "prefill"], "prefill"),
        ("bitmask", "same", ["gemv", "prefill"], "prefill"),
        ("two_of_four", "int8", ["gemv", "prefill"], "prefill"),
        ("block", "same", ["gemv", "prefill"], "prefill"),
        ("columns", "same", ["gemv", "prefill"], "prefill"),
    ],
)
def test_what_competes(name, values, few, many):
    clock = Clock(gemv=1.0, prefill=2.0, pytorch=2.0)
    prepared = prepare(packed(name, values), clock)
    assert prepared.choice(3).winner == "gemv"
    assert clock.asked == [few]
    assert prepared.choice(17).winner == many
    assert prepared.choice(17).how == "the only candidate"
    assert len(clock.asked) == 1


@NATIVE
@pytest.mark.parametrize("values", ["same", "int8"])
def test_one_input_of_columns_takes_the_kernel_that_skips_whatever_a_full_input_says(values):
    prepared = prepare(packed("columns", values), Clock(gemv=2.0, prefill=1.0))
    assert prepared.choice(1).winner == "gemv"
    assert prepared.choice(4).winner == "prefill"
    assert {found.name: found.lost for found in prepared.choice(1).candidates}["prefill"].startswith(
        "reads the channels"
    )


@NATIVE
@pytest.mark.parametrize(("used", "winner"), [(13, "gemv"), (64, "gemv"), (65, "prefill"), (130, "prefill")])
def test_several_inputs_of_columns_take_the_kernel_as_far_as_the_channels_that_they_use_together(
    used, winner, monkeypatch
):
    """A full call takes twice as long as prefill; half of the channels take as long."""
    prepared, x = prepare(packed("columns"), Clock(gemv=2.0, prefill=1.0)), inputs(4, SHAPE[1])
    x[:, used:] = 0
    x[1, :used] = 0  # a channel that one token does not use counts all the same
    assert prepared.choice(4).winner == "prefill"
    called = []
    monkeypatch.setattr(prepared, "_route", lambda name: lambda rows: called.append(name) or rows.new_zeros(4, 70))
    monkeypatch.setattr(
        prepared,
        "_chosen",
        {key: (found, prepared._route(found.winner)) for key, (found, _) in prepared._chosen.items()},
    )
    assert prepared(x).shape == (4, 70)
    assert called == [winner]


@NATIVE
@pytest.mark.parametrize("name", ["dense", "bitmask"])
@pytest.mark.parametrize("count", [1, 4, 5, 17, 128])
def test_inputs_that_must_not_notice_each_other_take_one_kernel_whatever_is_faster(name, count):
    prepared = prepare(packed(name), Clock(gemv=2.0, prefill=1.0, pytorch=1.0))
    assert prepared.choice(4).winner != "gemv"
    x = inputs(count, SHAPE[1])
    together = prepared.each_alone(x[None])
    assert together.shape == (1, count, SHAPE[0])
    assert torch.equal(together[0], torch.cat([prepared.each_alone(row) for row in x.split(1)]))


@NATIVE
def test_one_timing_serves_the_batches_up_to_its_own():
    clock = Clock(gemv=1.0, prefill=2.0)
    prepared = prepare(packed("bitmask"), clock)
    for batch, timings in ((1, 1), (1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (16, 3), (17, 3), (900, 3)):
        prepared(inputs(batch, SHAPE[1]))
        assert len(clock.asked) == timings
    again = prepare(packed("bitmask"), clock)  # another weight of the same case
    again(inputs(1, SHAPE[1]))
    assert len(clock.asked) == 3


@NATIVE
@pytest.mark.parametrize(("name", "slow"), [("bitmask", "prefill"), ("block", "prefill"), ("dense", "pytorch")])
@pytest.mark.parametrize("batch", [1, 16])
def test_the_winner_multiplies_and_every_route_keeps_the_bound(name, slow, batch, monkeypatch):
    weight, x = weight_for(name, *SHAPE), inputs(batch, SHAPE[1])
    bound = reference.error_bound(weight, x, SHAPE[1] * 2**-24) + reference.gemv(weight, x).abs() * 2**-8
    called = []

    def gemv(weight, x):
        called.append(len(x))
        return cpu.gemv(weight, x)

    for winner in ("gemv", slow):
        monkeypatch.setattr(choice_file, "_known", {})
        choice_file.path().unlink(missing_ok=True)
        prepared = prepare(build_format(name).pack(weight), Clock(**{"gemv": 5.0, slow: 5.0, winner: 1.0}))
        assert prepared.choice(batch).winner == winner
        with monkeypatch.context() as patch:
            patch.setattr("sparity.engine.kernels.prepared.cpu", SimpleNamespace(gemv=gemv, MOST_TOKENS=16))
            result = prepared(x)
        assert ((result.double() - reference.gemv(weight, x)).abs() <= bound).all()
    assert called == [batch]


def test_other_types_run_in_pytorch_and_say_why():
    prepared = prepare(packed("dense", dtype=torch.float32), Clock())
    found = prepared.choice(1)
    assert found.winner == "pytorch"
    assert [candidate.lost for candidate in found.candidates][:2] == [prepared.declined] * 2
    x = inputs(2, SHAPE[1]).float()
    weight = prepared.packed.tensors["values"]
    assert torch.equal(prepared(x), torch.nn.functional.linear(x, weight))


def test_a_matrix_that_contradicts_itself_is_not_prepared():
    for dtype in (torch.float32, torch.bfloat16):
        matrix = packed("bitmask", dtype=dtype)
        matrix.tensors["masks"][0] = 255
        with pytest.raises(CorruptFile):
            prepare(matrix)
