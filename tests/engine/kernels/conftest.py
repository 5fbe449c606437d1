"""Instruction sets."""

import pytest

from sparity.engine.kernels import native

ALL = ("scalar", "avx2", "avx512", "avx512_bf16")


@pytest.fixture(params=ALL)
def isa(request):
    """Kernels run with each instruction set that this processor has."""
    if reason := native.unavailable():
        pytest.skip(f"no compiled kernels: {reason}")
    if request.param not in native.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    with native.using(request.param):
        yield request.param
