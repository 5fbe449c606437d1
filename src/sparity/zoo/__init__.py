"""Small real models that were trained for this project."""

from pathlib import Path

from sparity.errors import InvalidInput, suggestion

PREFIX = "zoo:"
MODELS = ("llama",)


def path(name: str) -> Path:
    """The folder of a bundled model.

    Raises:
        InvalidInput: there is no model of that name.
    """
    if name not in MODELS:
        raise InvalidInput(f'no bundled model "{name}"{suggestion(name, MODELS)} (models: {", ".join(MODELS)})')
    return Path(__file__).parent / name
