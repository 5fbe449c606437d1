"""The one place that follows transformers' version drift: configurations, empty models, rotary tables."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparity import zoo
from sparity.errors import CorruptFile, InvalidInput, UnsupportedModel


def locate(model: str | Path) -> Path:
    """The folder of a model: a local path, a bundled one (`zoo:llama`), or a Hugging Face name that is fetched.

    Raises:
        InvalidInput: there is no such folder and no such repository can be reached.
    """
    if str(model).startswith(zoo.PREFIX):
        return zoo.path(str(model).removeprefix(zoo.PREFIX))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or len(path.parts) != 2 or path.is_absolute():
        what = "is not a folder" if path.exists() else "does not exist"
        raise InvalidInput(f"model {model}: this path {what}; give a Hugging Face folder or a name like owner/model")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"model {model}: no such folder here, and fetching it failed: {error}") from error


def read_config(folder: Path) -> Any:
    """The configuration of a Hugging Face folder."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.exists():
        raise InvalidInput(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        json.loads(path.read_text())
    except ValueError as error:
        raise CorruptFile(f"{path} is not JSON ({error})") from error
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModel(f"{path}: {str(error).splitlines()[0]}") from error
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(f"{folder} is already quantised: start from the model's unquantised weights")
    return config


def empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """A causal language model without memory for its parameters; buffers such as rotary tables are real."""
    from transformers import AutoModelForCausalLM

    try:
        with _parameters_on_meta():
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UnsupportedModel(
            f'"{config.model_type}" is not a causal language model of this transformers release: '
            f"{str(error).splitlines()[0]}"
        ) from error
    return model.eval()


def context_length(config: Any) -> int | None:
    """The longest sequence that a model takes, in tokens; None when it states none."""
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers within the context."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
