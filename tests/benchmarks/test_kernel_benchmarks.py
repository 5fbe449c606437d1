"""Benchmarks of kernels run to their end on matrices so small that only what they write can be looked at."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparity.engine.kernels import native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RUNS = {
    "prefill.py --shapes 64x64 --tokens 33 --rounds 1 --threads 1": "64x64, 33 tokens",
    "choice.py --shapes 64x64 --densities 0.5 --values same --rounds 1 --threads 1": "64x64, same, 50% kept",
    "instruction_sets.py --sets scalar --shapes 64x64 --rounds 1 --only int8 --megabytes 0": "64x64, batch 1",
    "skip.py --calls 3": None,
}

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")


def numbers(found):
    if isinstance(found, dict):
        return [number for part in found.values() for number in numbers(part)]
    return [found] if isinstance(found, int | float) and not isinstance(found, bool) else []


@pytest.mark.parametrize("run", RUNS)
def test_every_case_has_its_times(run, tmp_path):
    out = tmp_path / "out.json"
    script, *options = run.split()
    command = [sys.executable, str(BENCHMARKS / script), *options, "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert RUNS[run] is None or RUNS[run] in results
    found = numbers(results)
    assert found
    assert all(math.isfinite(number) and number > 0 for number in found)
