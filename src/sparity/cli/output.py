"""Text on standard output as it comes."""

import sys

from sparity.visible import harmless


def write(text: str) -> None:
    """Write text at once, made harmless on a terminal: a model may say anything; a file gets every character."""
    if sys.stdout.isatty():
        text = harmless(text)
    known = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(known, "replace").decode(known))
    sys.stdout.flush()
