"""Load a model that Sparity exported, or any Hugging Face folder, for use."""

from pathlib import Path
from typing import Any

from sparity.errors import CorruptFile
from sparity.models import transformers as hf
from sparity.models.source import CheckpointSource


def load(path: str | Path, *, device: str = "cpu", dtype: Any = "auto") -> Any:
    """A transformers model from a folder; its shards are checked first.

    Args:
        path: a Hugging Face folder or name.
        device: where the model is put.
        dtype: a torch type, or "auto" for the stored one.

    Raises:
        CorruptFile: a shard is missing or truncated.
        InvalidInput: the folder is not a model.
    """
    from transformers import AutoModelForCausalLM

    folder = hf.locate(path)
    hf.read_config(folder)
    CheckpointSource(folder)
    try:
        with hf.quiet():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise CorruptFile(f"transformers cannot load {folder}: {error}") from error
    return model.to(device).eval()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model folder, or None when it has none."""
    from transformers import AutoTokenizer

    folder = hf.locate(path)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return AutoTokenizer.from_pretrained(folder)
