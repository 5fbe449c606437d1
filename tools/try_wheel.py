"""Look into a wheel, then install it in an environment of its own and let it run a packed model there.

    python tools/try_wheel.py dist/sparity-*.whl

PyTorch and the other requirements are not installed again: the new environment sees those of the Python that runs this.
"""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

import torch
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).parents[1]
LIBRARY = "sparity/engine/kernels/libsparity_kernels.so"
SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
SYSTEM |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
SCRIPT = """
import json, torch
import sparity
from sparity.engine.kernels import native, openmp

packed = {"stages": [{"prune": {"score": "magnitude", "pattern": "2:4"}}], "output": {"format": "packed"}}
sparity.run({"model": "zoo:llama", "dtype": "bfloat16", "measure": {"speed": None}, **packed}, output="packed")
model = sparity.load("packed")
tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
found = {"home": sparity.__file__, "no kernels": native.unavailable(), "openmp": openmp.loaded()}
found["tokens"] = tokens.shape[1]
if not native.unavailable():
    found["library"] = native.library()._name
print(json.dumps(found))
"""


def faults(wheel):
    """What is wrong with a wheel of Linux, a sentence each: its tag, what it holds, what its library asks for."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        library = archive.read(LIBRARY) if LIBRARY in names else None
    found = []
    if not re.search(r"-py3-none-manylinux[\w.]+\.whl$", wheel.name):
        found.append(f"{wheel.name}: the tag is not py3-none-manylinux")
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/sparity").rglob("*") if path.is_file()}
    source = {name for name in source if "__pycache__" not in name and not name.endswith((".so", ".pyc"))}
    found += [f"{name} is missing" for name in sorted((source | {LIBRARY}) - names)]
    found += [
        f"{name} does not belong there" for name in sorted(names - source - {LIBRARY}) if ".dist-info/" not in name
    ]
    return found if library is None else found + library_faults(library)


def library_faults(content):
    """What is wrong with the compiled library: a search path, or a library that neither the system nor PyTorch has."""
    tags = list(ELFFile(io.BytesIO(content)).get_section_by_name(".dynamic").iter_tags())
    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    found = [f"the library looks for others in {tag.rpath}" for tag in tags if tag.entry.d_tag == "DT_RPATH"]
    found += [f"the library looks for others in {tag.runpath}" for tag in tags if tag.entry.d_tag == "DT_RUNPATH"]
    found += [f"the library needs {name}" for name in sorted(needed - SYSTEM - {"libgomp.so.1"})]
    if "libgomp.so.1" not in needed:  # under another name it would not be PyTorch's
        found.append("the library does not need libgomp.so.1")
    return found


def tried(wheel, folder):
    """Install the wheel in a new environment in `folder` and run a packed model there; what the process found."""
    home = folder / "environment"
    venv.create(home, with_pip=True)
    python = home / "bin/python"
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    (packages / "requirements_of_another.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # after its own
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel.resolve()], check=True)
    own = {key: value for key, value in os.environ.items() if not key.startswith(("SPARITY_", "PYTHON"))}
    said = subprocess.run([python, "-c", SCRIPT], cwd=folder, env=own, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(said.stdout.splitlines()[-1])
    for name in ("home", "library"):
        if name in found and not Path(found[name]).is_relative_to(packages):
            raise SystemExit(f"{found[name]} was used, which is not the wheel's")
    return found


def main(wheel):
    """Say what is wrong, or what ran."""
    found = faults(wheel)
    if found:
        raise SystemExit("\n".join(found))
    with tempfile.TemporaryDirectory() as folder:
        ran = tried(wheel, Path(folder))
    if ran["no kernels"] or len(ran["openmp"]) != 1:
        raise SystemExit(f"the wheel's kernels do not run, or not with PyTorch's OpenMP: {ran}")
    print(f"{wheel.name}: a packed model ran with {Path(ran['library']).name} and {ran['openmp'][0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
