"""The one place that follows transformers' version drift: configurations, empty models, rotary tables."""

import copy
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparity import zoo
from sparity.checkpoints import legacy_sparse
from sparity.checkpoints.packed import QUANTIZATION_KEYS
from sparity.errors import InvalidInput, UnsupportedModel
from sparity.files import expand, read_json_object
from sparity.models.ragged import hush, is_ragged, plain_config, ragged_kind

FETCHED = (  # of a repository; names in capitals are those of licences and the like
    "*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.spm", "bpe.codes", "*[Ll]icen[cs]e*",
    "*LICEN[CS]E*", "*NOTICE*", "*COPYING*", "*COPYRIGHT*", "*POLICY*", "*TERMS*", "*PATENTS*", "*ATTRIBUTION*",
    "*THIRD*PARTY*",
)  # fmt: skip


def locate(model: str | Path) -> Path:
    """The folder of a model: a local path, one of the zoo (`zoo:llama`), or a Hugging Face name that is fetched.

    A GGUF file is dequantised into a folder of the cache.

    Raises:
        InvalidInput: there is no such folder and no such repository can be reached.
        SparityError: the model of the zoo cannot be fetched, or the GGUF file cannot be read.
    """
    if not isinstance(model, str | Path):
        raise InvalidInput(f"a model is a folder, a name or a torch module, not {type(model).__name__}")
    if str(model).startswith(zoo.PREFIX):
        from sparity.models import fetched  # it reads GGUF files, which needs this module

        return fetched.path(str(model).removeprefix(zoo.PREFIX))
    if not str(model).strip():
        raise InvalidInput("the name of the model is empty: give a Hugging Face folder or a name like owner/model")
    path = expand(model)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that no folder can have
        return path
    from sparity.models import gguf

    exists = os.path.exists(path)
    if os.path.isfile(path) and gguf.is_gguf(path):
        return gguf.folder_of(path)
    if exists or len(path.parts) != 2 or path.is_absolute():
        what = "is neither a folder nor a GGUF file" if exists else "does not exist"
        raise InvalidInput(
            f"model {model}: this path {what}; give a Hugging Face folder, a GGUF file, or a name like owner/model"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(FETCHED)))
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"model {model}: no such folder here, and fetching it failed: {error}") from error


def read_config(folder: Path) -> Any:
    """The configuration of a Hugging Face folder.

    Raises:
        InvalidInput: there is none.
        CorruptFile: it is not a JSON object.
        UnsupportedModel: transformers does not know it or refuses its values, or the weights are quantised.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        files = sorted(folder.glob("*.gguf"))
        advice = f"; for the GGUF file in it, give {files[0]} itself" if files else ""
        raise InvalidInput(f"{folder} has no config.json: it is not a Hugging Face model folder{advice}")
    layout = legacy_sparse.layout_of(folder)
    read_json_object(path)  # numbers that are none would go on into everything that is computed and written
    try:
        hush()
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a wrong value can break transformers anywhere
        raise UnsupportedModel(f"{path}: {first_words(error)}") from error
    for key in QUANTIZATION_KEYS if layout else ():  # the weights are read as plain ones
        config.__dict__.pop(key, None)
    config.return_dict = True  # in what form outputs come is no property of a model, and tuples have no names
    return config


def gguf_config(file: Path) -> Any:
    """The configuration that a GGUF file describes.

    Raises:
        InvalidInput: transformers' reader does not know the architecture or refuses a value.
    """
    from transformers import AutoConfig

    with _gguf_errors(file):
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """The dequantised model of a GGUF file, and the names of the tensors that it lacks.

    Raises:
        InvalidInput: transformers' reader cannot read it.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = {
        "dtype": dtype,
        "quantization_config": GgufConfig(dequantize=True),
        "output_loading_info": True,
        "trust_remote_code": False,
    }
    with _gguf_errors(file):
        model, found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
    return model.eval(), sorted(found["missing_keys"])


def load_gguf_tokenizer(file: Path) -> Any:
    """The tokenizer that a GGUF file describes.

    Raises:
        InvalidInput: transformers' reader cannot read it.
    """
    from transformers import AutoTokenizer

    with _gguf_errors(file):
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)


def gguf_word_rules() -> tuple[str, ...]:
    """The ways of cutting text into words that transformers knows, by their names in GGUF."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # another release keeps them elsewhere
        return ()
    return tuple(GGUF_PRE_TOKENIZER_SPLITS)


@contextmanager
def _gguf_errors(file: Path) -> Iterator[None]:
    """Turn whatever transformers' reader of GGUF raises into one sentence, and keep its progress bars quiet."""
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # the reader's own bar goes to standard error
            yield
    except Exception as error:  # a wrong value can break the reader anywhere
        raise InvalidInput(
            f"transformers cannot read the GGUF file {file}: {first_words(error)}; use the model's safetensors"
        ) from error


def resized_config(config: Any, changes: Mapping[str, Any], check: bool = True) -> Any:
    """A copy of a configuration with other values for some of its attributes.

    Raises:
        InvalidInput: transformers refuses the values, which it is not asked about without `check`.
    """
    resized = copy.deepcopy(config)
    try:
        for attribute, value in changes.items():
            setattr(resized, attribute, value)
        if changes and check:
            resized.validate()  # whether the values fit one another
    except Exception as error:  # what is raised depends on the class and on the release
        values = ", ".join(f"{attribute} = {value}" for attribute, value in changes.items())
        raise InvalidInput(
            f'transformers refuses a configuration of type "{config.model_type}" with {values} '
            f"({first_words(error)}): choose other sizes"
        ) from error
    return resized


def empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """A causal language model without memory for its parameters; buffers such as rotary tables are real."""
    with _parameters_on_meta():
        return _built(config, dtype)


def outline_model(config: Any) -> nn.Module:
    """The same without memory for anything, whatever the sizes: shapes only. `config` stays as it is."""
    with torch.device("meta"):
        return _built(copy.deepcopy(config), torch.float32)


def _built(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        if is_ragged(config):
            ragged: nn.Module = model_kind(config)._from_config(config, dtype=dtype)
            return ragged.eval()
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # a wrong value can break transformers anywhere
        raise UnsupportedModel(
            f"this transformers release cannot build a causal language model from the configuration of type "
            f'"{config.model_type}": {first_words(error)}'
        ) from error
    return model.eval()


def model_kind(config: Any) -> Any:
    """What builds and loads models of a configuration; of blocks of different sizes too, which transformers does not.

    Raises:
        UnsupportedModel: transformers cannot build such a model.
    """
    from transformers import AutoModelForCausalLM

    if not is_ragged(config):
        return AutoModelForCausalLM
    outline = outline_model(plain_config(config))
    (blocks,) = (path for path, module in outline.named_modules() if _is_blocks(module, config))
    kind: Any = type(outline)
    return ragged_kind(kind, blocks)


def _is_blocks(module: nn.Module, config: Any) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers


def named_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating type from its name.

    Raises:
        InvalidInput: there is no such type.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidInput(f"dtype {dtype!r}: use float32, bfloat16, float16 or auto")
    return found


def context_length(config: Any) -> int | None:
    """The longest sequence that a model takes, in tokens; None when it states none."""
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def check_vocabulary(tokens: Tensor, config: Any, where: str = "calibration") -> None:
    """Raise `InvalidInput` when a token id is none of the model's."""
    size = config.vocab_size
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        raise InvalidInput(f"{where}: token ids run from {low} to {high}, but the model's vocabulary has {size} tokens")


@contextmanager
def named_outputs(model: Any) -> Iterator[None]:
    """Within the context the outputs of a model have names, whatever its configuration says."""
    own = getattr(model.config, "return_dict", True)
    model.config.return_dict = True
    try:
        yield
    finally:
        model.config.return_dict = own


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


def first_words(error: Exception) -> str:
    """What an error of transformers says, on one line and without its lists of every known class."""
    words = " ".join(str(error).split()) or type(error).__name__
    words = f"unknown value {words}" if isinstance(error, KeyError) else words
    return words if len(words) < 300 else f"{words[:300]} ..."


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
