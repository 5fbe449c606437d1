"""Load a model that Sparity exported, or any Hugging Face folder, for use."""

import copy
from pathlib import Path
from typing import Any

import torch

from sparity.checkpoints.packed import runtime_of
from sparity.checkpoints.source import CheckpointSource
from sparity.errors import CorruptFile, InvalidInput, SparityError, wrong_input
from sparity.models import transformers as hf
from sparity.models.attached_runtime import without_runtime
from sparity.models.families.base import family_of
from sparity.models.ragged import is_ragged
from sparity.models.size_check import check_sizes
from sparity.models.stored_names import check_kinds


@wrong_input()
def load(path: str | Path, *, device: str = "cpu", dtype: Any = "auto", runtime: bool = True) -> Any:
    """A transformers model from a folder; its shards are checked first.

    Args:
        path: a Hugging Face folder or name.
        device: where the model is put.
        dtype: a torch type, or "auto" for the stored one.
        runtime: whether the run-time stages that the model was saved with are attached.

    Raises:
        CorruptFile: a shard or the data of a run-time stage is missing, truncated or does not fit the configuration.
        InvalidInput: the folder is not a model, no such type, or a run-time stage that this release does not know.

    Example:
        >>> import sparity
        >>> model = sparity.load("zoo:llama", dtype="bfloat16")
        >>> model.dtype, model.num_parameters()
        (torch.bfloat16, 4008384)
    """
    return _load(path, device, dtype, runtime, packed=True)


def load_plain(path: str | Path, device: str, dtype: Any) -> Any:
    """As `load` without run-time stages, for work on the weights: packed ones are unpacked into ordinary layers."""
    return _load(path, device, dtype, runtime=False, packed=False)


def _load(path: str | Path, device: str, dtype: Any, runtime: bool, packed: bool) -> Any:
    folder = hf.locate(path)
    config, source = hf.read_config(folder), CheckpointSource(folder)
    check_sizes(folder, config, source.shapes())
    unpacking = source.packed and not packed
    if source.packed and packed and torch.device(device).type != "cpu":
        raise InvalidInput(
            f"{folder} is packed, and packed weights are multiplied on the CPU: convert it to plain first"
        )
    wanted = dtype if dtype == "auto" else hf.named_dtype(dtype)
    try:
        with hf.quiet():
            options: dict[str, Any] = {
                "dtype": wanted,
                "use_safetensors": True,
                "ignore_mismatched_sizes": True,  # they are refused below, by name
                "output_loading_info": True,
            }
            if unpacking:
                del config.quantization_config
            if source.rescued or unpacking:
                model, found = _from_tensors(config, source, options)
            else:
                if not runtime and runtime_of(folder):
                    options["config"] = without_runtime(config)
                if is_ragged(config):
                    options.setdefault("config", config)
                kind = hf.model_kind(options.get("config", config))
                model, found = kind.from_pretrained(folder, trust_remote_code=False, **options)
    except SparityError:
        raise
    except Exception as error:  # a wrong value of the configuration can break transformers anywhere
        raise CorruptFile(f"transformers cannot load {folder}: {hf.first_words(error)}") from error
    unfit = sorted(found["missing_keys"]) + sorted(str(key[0]) for key in found["mismatched_keys"])
    if unfit:  # transformers would fill them with random numbers
        raise CorruptFile(
            f"{folder} lacks {len(unfit)} tensors of the model or has them in another shape, {unfit[0]} among them: "
            "it is incomplete or belongs to another configuration"
        )
    model.config.return_dict = True  # as in `read_config`
    check_kinds(model, source, family_of(model.config))
    return model.to(device).eval()


def _from_tensors(config: Any, source: CheckpointSource, options: dict[str, Any]) -> Any:
    """A model from tensors that transformers cannot read itself, with what `from_pretrained` found."""
    from transformers import GenerationConfig

    kind: Any = type(hf.empty_model(copy.deepcopy(config), torch.float32))  # it writes the type into what it is given
    tensors = source.read(list(source.shapes()))
    model, found = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model, found


@wrong_input()
def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model folder, or None when it has none.

    Raises:
        CorruptFile: its files are damaged, or need a package that is not installed.
    """
    from transformers import AutoTokenizer

    folder = hf.locate(path)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception, and a missing package ImportError or ValueError
        raise CorruptFile(f"the tokenizer of {folder} cannot be loaded: {hf.first_words(error)}") from error
