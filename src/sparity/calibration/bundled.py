"""Text that every CPython brings along: its documentation and its own library's source.

Each has two halves that share no document: `calibration` and `held-out`.
"""

import sysconfig
from collections.abc import Callable
from pathlib import Path

from sparity.errors import InvalidInput, suggestion

PARTS = ("calibration", "held-out")


def is_bundled(text: str) -> bool:
    """Whether a text source names bundled text, such as `python-docs:calibration`."""
    return text.partition(":")[0] in _SOURCES


def bundled_documents(text: str) -> list[str]:
    """The documents of `python-docs:PART` or `python-code:PART`; PART is calibration (the default) or held-out."""
    name, _, part = text.partition(":")
    part = part or PARTS[0]
    if part not in PARTS:
        raise InvalidInput(f'{name} has no part "{part}"{suggestion(part, PARTS)} (parts: {", ".join(PARTS)})')
    documents = list(dict.fromkeys(_SOURCES[name]()))  # some topics are the same page under two names
    return documents[PARTS.index(part) :: 2]


def _python_docs() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[topic] for topic in sorted(topics)]


def _python_code() -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    return [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py")) if path.stat().st_size > 4096]


_SOURCES: dict[str, Callable[[], list[str]]] = {"python-docs": _python_docs, "python-code": _python_code}
