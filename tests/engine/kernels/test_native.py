"""Finding the library, choosing the instruction set, and doing without."""

import json
import subprocess
import sys

import pytest
import torch

from kernel_inputs import inputs, weight_for
from sparity.engine.kernels import native, prepare
from sparity.engine.kernels.native_weight import NativeWeight, declines
from sparity.errors import InvalidInput
from sparity.formats import build_format

NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}")
SAY = """
import json, os, sys
from sparity.engine.kernels import native, prepare
from sparity.errors import SparityError
import torch
for environment in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    os.environ.update(environment)
    try:
        print(native.unavailable() or native.instruction_set())
    except SparityError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)
"""


def said(*environments):
    """What a process says that has just been started, in each of some environments."""
    command = [sys.executable, "-c", SAY, json.dumps(environments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@NATIVE
def test_the_environment_chooses(tmp_path):
    (tmp_path / "broken.so").write_text("not a library")
    scalar, best, unknown, without, nowhere, broken = said(
        {"SPARITY_ISA": "scalar"},
        {"SPARITY_ISA": ""},
        {"SPARITY_ISA": "avx9"},
        {"SPARITY_NO_NATIVE": "1"},
        {"SPARITY_LIBRARY": "nowhere.so"},
        {"SPARITY_LIBRARY": str(tmp_path / "broken.so")},
    )
    assert scalar == "scalar"
    assert best == native.instruction_sets()[-1]
    assert unknown.startswith('SPARITY_ISA: this processor has no "avx9"; did you mean "avx2"? choose')
    assert without == "SPARITY_NO_NATIVE is set"
    assert nowhere.startswith("they were not built")
    assert broken.startswith("broken.so cannot be used")


@NATIVE
def test_using_is_undone():
    before = native.instruction_set()
    with native.using("scalar"):
        assert native.instruction_set() == "scalar"
    assert native.instruction_set() == before
    with pytest.raises(InvalidInput, match='no "avx9"'), native.using("avx9"):
        pass


def test_without_the_library_pytorch_does_it(monkeypatch):
    monkeypatch.setattr("sparity.engine.kernels.native._load", lambda: "for this test")
    native.unavailable.cache_clear()
    weight, x = weight_for("bitmask", 20, 70), inputs(3, 70)
    prepared = prepare(build_format("bitmask").pack(weight))
    assert prepared.declined == "for this test"
    assert torch.equal(prepared(x), torch.nn.functional.linear(x, weight))
    assert native.instruction_sets() == []
    with pytest.raises(InvalidInput, match="no compiled kernels: for this test"):
        native.library()
    native.unavailable.cache_clear()


def test_reading_sums_every_word(isa):
    words = torch.arange(1000, dtype=torch.int64) * 2**50
    for count in (0, 1, 31, 1000):
        wanted = int(words[:count].sum()) % 2**64
        assert native.library().sparity_read(words.data_ptr(), count * 8, 3) == wanted


@NATIVE
def test_what_is_declined_and_why():
    weight = weight_for("block", 32, 64)
    for spec, values, words in (
        ("csr", "same", "no kernel for the format csr"),
        ({"block": {"columns": 8}}, "same", "multiple of 16"),
        ("block", "int8", "no kernel for the format block with int8 values"),
    ):
        packed = build_format(spec).pack(weight, values)
        assert words in declines(packed)
        with pytest.raises(InvalidInput, match=words):
            NativeWeight(packed)
        assert torch.isfinite(prepare(packed)(inputs(2, 64))).all()
    assert "take bfloat16, not float32" in declines(build_format("dense").pack(weight.float()))
    assert declines(build_format("bitmask").pack(weight)) is None


@NATIVE
def test_a_large_weight_moves_to_large_pages_and_stays_itself():
    packed = build_format("bitmask").pack(weight_for("bitmask", 1024, 3000))
    prepared = prepare(packed)
    assert prepared.packed.tensors["values"].data_ptr() % (1 << 21) == 0
    assert torch.equal(prepared.packed.tensors["values"], packed.tensors["values"])
    x = inputs(2, 3000)
    assert torch.equal(prepared(x), prepare(prepared.packed)(x))
    assert prepared(x[0]).shape == (1024,)
    assert prepared(x[:, None]).shape == (2, 1, 1024)
    values = prepared.packed.tensors["values"]
    assert prepare(prepared.packed).packed.tensors["values"].data_ptr() == values.data_ptr()  # moved once
    del prepared
    assert torch.equal(values, packed.tensors["values"])  # the memory lives as long as a tensor does
