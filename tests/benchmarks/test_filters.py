"""Filters of a convolutional network: which stay, and that a cut changes nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCORES = [torch.tensor([0.1, 0.9, 0.5, 0.2]), torch.tensor([0.3, 0.4, 0.8, 0.7])]


@pytest.fixture
def filters(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import filters

    return filters


def test_each_layer_gives_up_as_many(filters):
    assert [places.tolist() for places in filters.kept_of_each(SCORES, 0.5)] == [[1, 2], [2, 3]]
    assert [places.tolist() for places in filters.kept_of_each(SCORES, 0.25)] == [[1, 2, 3], [1, 2, 3]]
    assert [len(places) for places in filters.kept_of_each(SCORES, 0.9)] == [filters.FLOOR] * 2


def test_one_threshold_for_all_layers(filters):
    assert [places.tolist() for places in filters.kept_of_all(SCORES, 0.25)] == [[1, 2], [0, 1, 2, 3]]
    assert [len(places) for places in filters.kept_of_all(SCORES, 0.9)] == [filters.FLOOR] * 2


def test_a_cut_network_is_the_whole_one_with_silent_filters(filters):
    torch.manual_seed(0)
    net = filters.train(filters.network((6, 5, 4)), 3, 0)
    kept = [torch.tensor([0, 2, 5]), torch.tensor([1, 4]), torch.tensor([0, 1, 3])]
    smaller = filters.cut(net, kept).eval()
    for (_, norm), places in zip(filters.convolutions(net), kept, strict=True):
        gone = torch.ones(len(norm.weight), dtype=torch.bool)
        gone[places] = False
        with torch.no_grad():
            norm.weight[gone], norm.bias[gone] = 0, 0
    pixels, _ = filters.images(7, torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(smaller(pixels), net.eval()(pixels))
    assert filters.size(smaller) == 9 * (3 + 2 * 3 + 3 * 2) + 2 * 8 + 3 * 8 + 8


def test_the_study_runs():
    command = [sys.executable, str(BENCHMARKS / "filters.py"), "--steps", "4", "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [line.split(" | ")[0].removeprefix("| ") for line in done.stdout.splitlines()[2:]]
    assert names[0] == "dense"
    assert set(names) >= {"L1 norm of filters", "Network Slimming", "its sizes, from scratch"}
