"""The entry point under `sagellm.accelerators`: an engine's model on Sparity's kernels."""

from typing import Any

from sparity import __version__
from sparity.errors import InvalidInput

PROCESSOR = "cpu"


class SparsityAccelerator:
    """Found by its entry point's name, `sparity`; nothing heavy is imported before `apply`."""

    @classmethod
    def meta(cls) -> dict[str, Any]:
        """Name, version and what it does."""
        return {
            "name": "sparity",
            "version": __version__,
            "description": "multiplies packed sparse weights on the processor",
            "backends": [PROCESSOR],
        }

    @classmethod
    def is_available(cls) -> bool:
        """Whether the compiled kernels run on this machine."""
        from sparity.engine.kernels import native

        return native.unavailable() is None

    @classmethod
    def is_compatible_with_backend(cls, backend: Any) -> bool:
        """Whether a backend, or its name, is the processor's."""
        return str(getattr(backend, "name", backend)).lower() == PROCESSOR

    @classmethod
    def apply(cls, engine: Any) -> Any:
        """Put the model of an engine on Sparity's kernels, in place; the engine is returned.

        Args:
            engine: a causal language model of transformers in bfloat16 on the CPU, or what holds one as `model`.

        Raises:
            InvalidInput: neither.
        """
        from transformers import PreTrainedModel

        from sparity.engine.attach import attach

        model = engine if isinstance(engine, PreTrainedModel) else getattr(engine, "model", None)
        if not isinstance(model, PreTrainedModel):
            raise InvalidInput(
                f"sparity: {type(engine).__name__} is no transformers model and holds none as `model`: apply it to "
                "the model itself"
            )
        attach(model)
        return engine
