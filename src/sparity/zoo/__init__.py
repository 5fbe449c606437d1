"""Small real models that were trained for this project."""

from pathlib import Path

from sparity.errors import InvalidInput, suggestion

PREFIX = "zoo:"
BUNDLED = ("llama",)
MODELS = (*BUNDLED, "relu", "moe")  # the others lie in the repository, which would make the package four times as large


def path(name: str) -> Path:
    """The folder of a model of the zoo.

    Raises:
        InvalidInput: there is no model of that name, or this installation does not have it.
    """
    if name not in MODELS:
        raise InvalidInput(f'no bundled model "{name}"{suggestion(name, MODELS)} (models: {", ".join(MODELS)})')
    here = Path(__file__).parent
    folder = here / name if name in BUNDLED else here.parents[2] / "zoo" / name
    if not (folder / "config.json").is_file():
        raise InvalidInput(
            f"zoo:{name} is not in the installed package, only in Sparity's repository: clone that and give the folder "
            f"zoo/{name}, or install the clone with pip install -e (looked for {folder})"
        )
    return folder
