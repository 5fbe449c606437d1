"""Wheels as `make dist` makes them: the tag, what they hold, and what their library asks for.

Compiling takes minutes, so the wheel of these tests is built around the library that is in use.
"""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from documents import ROOT
from sparity.engine.kernels import native

try_wheel = pytest.importorskip("try_wheel", reason="the extra dist is not installed", exc_type=ImportError)
TOOLS = all(importlib.util.find_spec(name) for name in ("scikit_build_core", "auditwheel"))
pytestmark = [
    pytest.mark.skipif(not TOOLS, reason="the extra dist is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="wheels of Linux"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake"),
    pytest.mark.skipif(native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}"),
]
CMAKE = """\
cmake_minimum_required(VERSION 3.18)
project(compiled_before LANGUAGES NONE)
install(FILES "{library}" DESTINATION sparity/engine/kernels RENAME libsparity_kernels.so)
"""
BUILD = """import sys
from scikit_build_core.build import build_wheel
build_wheel(sys.argv[1], {"cmake.source-dir": sys.argv[1]})
"""


def tool(name, *arguments):
    """A command of the environment that runs the tests, with its folder first in the path."""
    folder = Path(sys.executable).parent
    path = {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run([folder / name, *arguments], env=path, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel as the build leaves it, of this system only."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "CMakeLists.txt").write_text(CMAKE.format(library=Path(native.library()._name).resolve()))
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repaired")
    tool("auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", folder, built)
    (found,) = folder.glob("*.whl")
    return found


def test_a_wheel_serves_every_python_and_brings_no_openmp(built, wheel):
    assert built.name.endswith("-py3-none-linux_x86_64.whl")
    assert try_wheel.faults(wheel) == []
    assert try_wheel.faults(built) == [f"{built.name}: the tag is not py3-none-manylinux"]


def test_a_wheel_holds_the_package_its_model_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(about).decode()
        points = archive.read(about.replace("METADATA", "entry_points.txt")).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sparity"}
    assert {"sparity/py.typed", "sparity/zoo/llama/model.safetensors", "sparity/measure/show/page.css"} <= names
    assert about.replace("METADATA", "licenses/LICENSE") in names
    assert [name for name in names if "/tests/" in name or name.endswith((".cpp", ".h", ".pyc"))] == []
    assert "Requires-Dist: torch>=2.11" in metadata
    assert "Provides-Extra: docs" in metadata
    assert "sparity = sparity.cli.main:main" in points


def test_a_library_that_was_put_in_or_a_missing_file_is_told(wheel, tmp_path):
    other = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            if name != "sparity/recipe.py":
                new.writestr(name, old.read(name))
        new.writestr("sparity.libs/libgomp-a34b3233.so.1", b"")
    assert try_wheel.faults(other) == [
        "sparity/recipe.py is missing",
        "sparity.libs/libgomp-a34b3233.so.1 does not belong there",
    ]


def test_a_library_with_a_search_path_or_another_openmp_is_told(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(try_wheel.LIBRARY)
    assert try_wheel.library_faults(content) == []
    changed = tmp_path / "changed.so"
    changed.write_bytes(content)
    tool("patchelf", "--set-rpath", "$ORIGIN/../libs", "--replace-needed", "libgomp.so.1", "libgomp-a34b.so.1", changed)
    assert try_wheel.library_faults(changed.read_bytes()) == [
        "the library looks for others in $ORIGIN/../libs",
        "the library needs libgomp-a34b.so.1",
        "the library does not need libgomp.so.1",
    ]
