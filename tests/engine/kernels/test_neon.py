"""The library on 64-bit ARM, built by a cross compiler and run under emulation: the bits that it has on this processor.

NEON adds in the order of AVX2, and plain C++ in that of plain C++, so every result is the same, bit for bit.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import kernel_calls
from kernel_inputs import inputs, weight_for
from recorded_calls import differences, recorded, replay
from sparity.engine.kernels import native
from sparity.engine.kernels.gemv.cpu import gemv
from sparity.engine.kernels.native_weight import NativeWeight
from sparity.formats import build_format

NATIVE = pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}")
SOURCES = Path(__file__).parents[3] / "csrc"
NEEDED = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
    "cmake": "cmake",
}  # and the Debian package that has it


@pytest.fixture(scope="module")
def replayer(tmp_path_factory):
    """The command that makes recorded calls on an emulated ARM; `SPARITY_AARCH64` names a folder where it is built."""
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this processor runs neon itself: all other tests of the kernels use it")
    if absent := [f"{command} (Debian: {NEEDED[command]})" for command in NEEDED if not shutil.which(command)]:
        pytest.skip(f"ARM cannot be emulated: there is no {', no '.join(absent)}")
    built = os.environ.get("SPARITY_AARCH64")
    folder = Path(built) if built else tmp_path_factory.mktemp("aarch64")
    if not built:  # hardly optimised, which takes seconds instead of minutes and changes no bit
        options = (f"--toolchain={SOURCES}/toolchains/aarch64-linux-gnu.cmake", "-DSPARITY_OPTIMIZE=-O0")
        run("cmake", "-S", SOURCES, "-B", folder, *options, "-DSPARITY_REPLAY=ON")
        run("cmake", "--build", folder)
    return ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu", str(folder / "replay")]


def run(*command):
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_library_names_it(replayer):
    assert run(*replayer).split() == ["scalar", "neon"]


@NATIVE
@pytest.mark.parametrize(("there", "here"), [("scalar", "scalar"), ("neon", "avx2")])
def test_every_kernel_has_the_same_bits(replayer, there, here, tmp_path):
    if here not in native.instruction_sets():
        pytest.skip(f"this processor has no {here}, whose bits those of {there} are")
    for case in kernel_calls.EVERY:
        with recorded(here, threads=2) as calls:
            case()
        assert calls
        assert differences(calls, replay(calls, replayer, there, tmp_path)) == [], case.__name__


def test_what_an_unknown_instruction_set_says(replayer, tmp_path):
    (tmp_path / "calls").write_bytes(bytes(8))
    command = [*replayer, "avx2", tmp_path / "calls", tmp_path / "results"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "replay: this processor has no avx2\n"


@NATIVE
def test_a_bit_or_a_status_that_differs_is_told():
    with recorded("scalar") as calls:
        weight = NativeWeight(build_format("bitmask").pack(weight_for("bitmask", 3, 70), "int8"))
        gemv(weight, inputs(2, 70), torch.full((2, 3), float("nan")))
    assert [call.name for call in calls] == ["sparity_row_sums", "sparity_gemv"]
    found = [
        (call.status, [b"" if block.dtype is None else block.contents() for block in call.blocks]) for call in calls
    ]
    assert differences(calls, found) == []
    of_result = calls[1].after.index(next(data for data in calls[1].after if data not in calls[1].before))
    result = bytearray(found[1][1][of_result])
    result[4] ^= 1  # the last bit of the second number
    found[1] = (7, [bytes(result) if i == of_result else data for i, data in enumerate(found[1][1])])
    status, other = differences(calls, found)
    assert status == "call 1, sparity_gemv: 7 instead of 0"
    assert other.startswith("call 1, sparity_gemv: 1 of 6 differ, number 1 is ")


@NATIVE
def test_memory_that_nobody_asked_for_is_not_passed_on():
    with recorded("scalar"), pytest.raises(AssertionError, match="unknown memory"):
        native.library().sparity_read(1 << 40, 8, 1)
