"""OpenMP runtimes of a process: told from its memory maps, and one for PyTorch and the compiled kernels together."""

import json
import subprocess
import sys

import pytest

from sparity.engine.kernels import native, openmp

MAPS = """\
55d0c0a00000-55d0c0a01000 r--p 00000000 00:1f 10 /usr/bin/python3
7f0000000000-7f0000001000 r--p 00000000 00:1f 11 /env/torch/lib/libgomp.so.1
7f0000001000-7f0000002000 r-xp 00001000 00:1f 11 /env/torch/lib/libgomp.so.1
7f0000002000-7f0000003000 r--p 00000000 00:1f 12 /env/my libs/libgomp-a49a47f9.so.1.0.0 (deleted)
7f0000003000-7f0000004000 r--p 00000000 00:1f 13 /env/lib/libiomp5.so
7f0000004000-7f0000005000 r--p 00000000 00:1f 14 /env/lib/libomptarget.so
7f0000005000-7f0000006000 rw-p 00000000 00:00 0
7f0000006000-7f0000007000 rw-p 00000000 00:00 0 [stack]
"""
SCRIPT = """
import json, torch
from sparity.engine.kernels import native, openmp
print(json.dumps([native.unavailable(), openmp.loaded()]))
"""


def test_every_runtime_counts_once():
    found = openmp.loaded(MAPS)
    assert found == ("/env/lib/libiomp5.so", "/env/my libs/libgomp-a49a47f9.so.1.0.0", "/env/torch/lib/libgomp.so.1")
    assert openmp.words(found).startswith("3 copies, which may disturb each other: env/lib/libiomp5.so, ")
    assert openmp.words(found[2:]) == "torch/lib/libgomp.so.1"
    assert openmp.words(openmp.loaded("")) == "none seen"


@pytest.mark.skipif(not openmp.MAPS.exists(), reason="this system shows no memory maps")
@pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}")
def test_pytorch_and_the_kernels_share_one():
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    unavailable, found = json.loads(said)
    assert unavailable is None
    assert len(found) == 1
