"""Instruction sets, and where Triton's kernels run."""

import pytest
import torch

from sparity.engine.kernels import choice, choice_file, native

ALL = ("scalar", "avx2", "avx_vnni", "avx512", "avx512_bf16", "neon")


@pytest.fixture(params=ALL)
def isa(request):
    """Kernels run with each instruction set that this processor has."""
    if reason := native.unavailable():
        pytest.skip(f"no compiled kernels: {reason}")
    if request.param not in native.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    with native.using(request.param):
        yield request.param


@pytest.fixture(scope="session")
def gpu():
    """A CUDA GPU, or, by Triton's interpreter, the processor."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The file of timings, of this test alone."""
    monkeypatch.setenv("SPARITY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice_file, "_known", {})
    choice_file._say_once.cache_clear()
    return tmp_path / "cache" / "kernels.json"


@pytest.fixture
def small_ones_too(cache, monkeypatch):
    """Small weights are timed like large ones."""
    monkeypatch.setattr(choice, "SMALL", 0)
