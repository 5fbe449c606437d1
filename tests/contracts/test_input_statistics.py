"""The laws of a statistic of inputs, for every one that the registry finds."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sparity import registry
from sparity.calibration import Statistics
from sparity.calibration.input_statistics import gram
from sparity.calibration.input_statistics.base import statistic
from sparity.calibration.statistics import GRADIENTS, REGIONAL
from sparity.calibration.store import StatisticsStore
from sparity.errors import InvalidInput, NumericalError

NAMES = registry.names("statistic")
OVERFLOWS = ("column_norm", "gram")  # the square of 1e30 is no float32


def gathered(name, *batches):
    statistics = Statistics.gather("here", [name])
    for batch in batches:
        statistics.add(batch)
    return statistics


def integers(sequences, tokens, columns, seed):
    """Small whole numbers, whose sums, products and means of squares float32 holds exactly, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (sequences, tokens, columns), generator=generator).float()


def write_and_read(folder, gathered, columns, needs):
    store = StatisticsStore(folder)
    store.save(0, {"here": gathered})
    store.close({}, needs)
    block = SimpleNamespace(index=0, module=torch.nn.Linear(1, 1))
    site = SimpleNamespace(name="here", projections=(SimpleNamespace(weight=torch.zeros(2, columns)),))
    return StatisticsStore.open(folder, {}).read(block, site)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 5), second=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_halves_merged_are_the_whole(name, first, second, columns, seed):
    inputs = integers(first + second, 3, columns, seed)
    whole = gathered(name, inputs)
    halves = [gathered(name, *([part] if len(part) else [])) for part in inputs.split([first, second])]
    for merged in (halves[0].merge(halves[1]), halves[1].merge(halves[0])):
        assert (merged.sequences, merged.tokens) == (whole.sequences, whole.tokens)
        assert torch.equal(merged.sums[name], whole.sums[name])
        assert torch.equal(merged[name], whole[name])
    before = halves[1].sums[name].clone()
    halves[1].merge(halves[0]).add(inputs)  # what came of it is apart from its halves
    assert torch.equal(halves[1].sums[name], before)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_merged_with_something_is_the_something(name):
    counted, total = statistic(name), gathered(name, integers(2, 3, 5, 0)).sums[name]
    empty = counted.empty(5, "cpu")
    assert (empty.shape, empty.dtype) == (total.shape, total.dtype)
    assert torch.equal(counted.merge(empty, total), total)
    assert torch.equal(counted.merge(total, empty), total)
    assert counted.is_finite(empty)


@pytest.mark.parametrize("name", NAMES)
def test_neither_the_order_nor_the_batches_count(name):
    inputs = integers(6, 4, 7, 1)
    whole = gathered(name, inputs)
    for batches in (inputs.split(1), inputs.flip(0).split([1, 3, 2]), [inputs.flip(1)]):
        assert torch.equal(gathered(name, *batches)[name], whole[name])


@pytest.mark.parametrize("name", NAMES)
def test_adding_changes_no_input_and_counts_in_float32(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = integers(2, 3, 5, 2).to(dtype)
        before = inputs.clone()
        assert torch.equal(gathered(name, inputs)[name], gathered(name, before.float())[name])
        assert torch.equal(inputs, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_value_stays_the_same_until_more_inputs_come(name, monkeypatch):
    monkeypatch.setattr(gram, "PANEL", 3)
    first, second = integers(2, 3, 8, 3), integers(2, 3, 8, 4)
    statistics = gathered(name, first)
    value = statistics[name].clone()
    assert torch.equal(statistics[name], value)
    assert torch.equal(statistics.with_gradients({})[name], value)
    statistics.add(second)
    assert torch.equal(statistics[name], gathered(name, first, second)[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 4), (0, 1, 2)])
def test_an_input_that_is_not_finite_is_refused_wherever_it_is(name, bad, place):
    inputs = integers(2, 3, 5, 5)
    inputs[place] = bad
    with pytest.raises(NumericalError, match="here: the inputs hold NaN or infinite numbers; use a wider dtype"):
        gathered(name, inputs)


@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_input_too_large_to_be_squared_is_refused(name):
    with pytest.raises(NumericalError, match="here: the inputs hold NaN or infinite numbers"):
        gathered(name, torch.tensor([[1.0, 1e30]]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [1, 3, 8])
def test_its_bytes_are_those_that_are_written_and_every_bit_comes_back(name, columns, tmp_path, monkeypatch):
    monkeypatch.setattr(gram, "PANEL", 3)
    statistics = gathered(name, torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(columns)))
    read = write_and_read(tmp_path, statistics, columns, [name])
    written = load_file(tmp_path / "statistics-00000.safetensors")
    counts = written.pop("tokens.here"), written.pop("sequences.here")
    assert [int(count) for count in counts] == [10, 2]
    assert sum(tensor.nbytes for tensor in written.values()) == statistic(name).nbytes(columns)
    assert torch.equal(read[name], statistics[name])
    assert read.sums[name].dtype == statistics.sums[name].dtype


@pytest.mark.parametrize(
    ("name", "columns", "nbytes"),
    [
        ("mean", 2500, 10_000),
        ("column_norm", 2500, 10_000),
        ("histogram", 2500, 32_768 * 8),
        ("gram", 2500, 4 * (1024 * 2500 + 1024 * 1476 + 452 * 452)),  # three panels
        ("gram", 1024, 4 * 1024 * 1024),
    ],
)
def test_bytes_by_hand(name, columns, nbytes):
    assert statistic(name).nbytes(columns) == nbytes


def test_a_store_keeps_all_of_them_under_the_names_that_it_always_had(tmp_path):
    inputs = integers(2, 3, 4, 6)
    statistics = Statistics.gather("here", ["mean", "column_norm", "gram", "histogram"])
    statistics.add(inputs)
    write_and_read(tmp_path, statistics, 4, statistics.needs)
    written = load_file(tmp_path / "statistics-00000.safetensors")
    assert written.keys() == {
        *("tokens.here", "sequences.here", "sum.here", "sum_of_squares.here", "gram.here.0", "histogram.here")
    }
    x = inputs.reshape(-1, 4)
    assert torch.equal(written["sum.here"], x.sum(0))
    assert torch.equal(written["sum_of_squares.here"], x.square().sum(0))
    assert torch.equal(written["gram.here.0"], x.T @ x)


def test_no_two_are_stored_alike_and_none_is_called_as_a_gradient():
    stored = [statistic(name).stored_as or name for name in NAMES]
    assert len({*stored, "tokens", "sequences"}) == len(NAMES) + 2
    assert not {*NAMES} & {*GRADIENTS, REGIONAL}


def test_a_method_sees_only_what_it_asked_for():
    statistics = Statistics.gather("here", NAMES)
    statistics.add(integers(2, 3, 5, 7))
    statistics = statistics.with_gradients({"gradient": torch.ones(2, 5), REGIONAL: torch.ones(2, 5)})
    few = statistics.only(["mean", "gradient"])
    assert torch.equal(few.mean, statistics.mean)
    assert torch.equal(few["gradient"], torch.ones(2, 5))
    assert few.sums["mean"] is statistics.sums["mean"]
    for other in (*(name for name in NAMES if name != "mean"), REGIONAL, "gradient_square"):
        with pytest.raises(InvalidInput, match=f'here: the statistic "{other}" was not gathered'):
            few[other]
