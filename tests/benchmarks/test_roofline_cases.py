"""The cases of planned against measured times, by hand."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparity.measure.data.report import Pace, Spread
from sparity.measure.data.roofline import Load

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import roofline


def pace(first, rate):
    return Pace(Spread(first, first, first), Spread(rate, rate, rate))


def found(batch):
    """Planned: 1 ms a step and 20 ms a prompt of the dense model, half of both sparse."""
    planned = SimpleNamespace(dense=(Load(0, 0, 1e-3), Load(0, 0, 20e-3)), sparse=(Load(0, 0, 5e-4), Load(0, 0, 10e-3)))
    dense = SimpleNamespace(pace=pace(40e-3, batch / 1.05e-3))
    return planned, SimpleNamespace(sparse=pace(11e-3, batch / 1e-3), engine_dense=dense)


def test_rows_by_hand():
    some = [found(batch) for _, batch, _ in roofline.SETTINGS]
    rows = roofline.cases("m", "50 %", some, dense=True)
    ratios = {(row["form"], row["phase"]): row["ratio"] for row in rows}
    expected = {("dense", "decode"): 1.05, ("dense", "prompt"): 2, ("50 %", "decode"): 2, ("50 %", "prompt"): 1.1}
    assert ratios == pytest.approx(expected)
    told = roofline.summary(rows)
    assert (told["all"]["cases"], told["decode"]["cases"], told["prompt"]["cases"]) == (10, 4, 6)
    assert (told["decode"]["within"], told["decode"]["ratio"]["low"]) == (2, pytest.approx(1.05))
    assert "| m | dense | decode | 128 | 4 | 1.00 | 1.05 | 1.05 |" in roofline.table(rows)


def test_there_are_fifty():
    some = [found(batch) for _, batch, _ in roofline.SETTINGS]
    each = [len(roofline.cases("m", name, some, dense=not at)) for at, name in enumerate(roofline.STAGES)]
    assert 2 * sum(each) == 50
