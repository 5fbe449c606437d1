"""What a configuration of sageLLM's specification means in Sparity: stages of a recipe, or a clear refusal."""

from collections.abc import Mapping
from typing import Any

from sparity.errors import InvalidInput
from sparity.integrations.sagellm.protocol import SparsityConfig, check_types

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"score": "magnitude"},
    "gradient": {"score": "gradient"},
    "hessian": {"score": "obs"},
    "wanda": {"score": "wanda"},
    "sparsegpt": {"solver": "sparsegpt"},
}
WITH_GRADIENT = {"magnitude": "taylor", "hessian": "fisher", "wanda": "gblm", "gradient": "gradient"}
READS_NO_TEXT = "magnitude"
GROUPS = (128, 64, 32)  # neighbours that share a scale: the first that divides every row
NO_ENGINE = (
    "backend tensorrt: `prune` exports an ordinary Hugging Face folder with its zeros, which TensorRT-LLM's "
    "convert_checkpoint.py and trtllm-build take; no engine is built and nothing is run here, because that needs "
    "TensorRT-LLM and the GPU that the engine is for"
)

_ONLY_WITH: dict[str, tuple[str, ...]] = {  # a field -> the patterns for which it means something
    "sparsity_ratio": ("unstructured", "block", "n:m"),
    "n": ("n:m",),
    "m": ("n:m",),
    "pruning_method": ("unstructured", "n:m", "block"),
    "target_layers": ("unstructured", "n:m", "block"),
    "exclude_layers": ("unstructured", "n:m", "block"),
    "calibration_dataset": ("unstructured", "n:m", "block"),
    "use_gradient": ("unstructured", "n:m", "block"),
    "block_size": ("block",),
    "format": ("unstructured", "n:m", "block"),
    "fuse_with_quant": ("unstructured", "n:m", "block"),
    "use_hardware_accel": ("n:m",),
}
_HELD_AS = {"unstructured": ("csr", "coo", "dense"), "n:m": ("csr", "dense"), "block": ("csr", "bsr", "dense")}


def check(config: SparsityConfig) -> None:
    """Refuse a configuration that contradicts itself, or a field that would do nothing.

    Raises:
        InvalidInput: the message names the field and says what to do.
    """
    check_types(config)
    for name, value in config.changed().items():
        patterns = _ONLY_WITH.get(name)
        if patterns is not None and config.pattern not in patterns:
            raise InvalidInput(
                f'SparsityConfig.{name} = {value!r} does nothing with pattern "{config.pattern}" (it is for '
                f"{', '.join(patterns)}): leave it out"
            )
    _check_share(config)
    _check_method(config)
    if config.pattern in _HELD_AS and config.format not in _HELD_AS[config.pattern]:
        raise InvalidInput(
            f'SparsityConfig.format = "{config.format}" does not hold pattern "{config.pattern}": take '
            f"{' or '.join(_HELD_AS[config.pattern])}"
        )
    if "dynamic_threshold" in config.changed() and not is_dynamic(config):
        raise InvalidInput(
            "SparsityConfig.dynamic_threshold does nothing without enable_dynamic=True: set both or none"
        )
    if config.pattern == "block" and config.backend == "triton":
        raise InvalidInput(
            'SparsityConfig.backend = "triton" does nothing: no kernel is named for blocks; leave it out'
        )
    if is_dynamic(config) and config.backend == "tensorrt":
        raise InvalidInput(
            f"{NO_ENGINE}; activations are skipped while a model runs, so dynamic sparsity is not exported"
        )
    if config.quant_dtype is not None and not config.fuse_with_quant:
        raise InvalidInput("SparsityConfig.quant_dtype does nothing without fuse_with_quant=True: set both or none")
    if config.fuse_with_quant:
        quantized_to(config.quant_dtype)


def is_dynamic(config: SparsityConfig) -> bool:
    """Whether activations are skipped while the model runs."""
    return config.enable_dynamic or config.pattern == "dynamic"


def _check_share(config: SparsityConfig) -> None:
    if config.pattern == "n:m":
        if config.n >= config.m:
            raise InvalidInput(
                f"SparsityConfig: n = {config.n} of m = {config.m} are kept, so n must be less than m: 2:4 removes half"
            )
        says = 1 - config.n / config.m
        if "sparsity_ratio" in config.changed() and abs(config.sparsity_ratio - says) > 1e-9:
            raise InvalidInput(
                f"SparsityConfig.sparsity_ratio = {config.sparsity_ratio:g} contradicts {config.n}:{config.m}, which "
                f"removes {says:g}: leave it out, or take another n and m"
            )
    elif config.sparsity_ratio >= 1:
        raise InvalidInput(f"SparsityConfig.sparsity_ratio = {config.sparsity_ratio:g} must be less than 1")


def _check_method(config: SparsityConfig) -> None:
    if config.use_gradient and config.pruning_method not in WITH_GRADIENT:
        raise InvalidInput(
            f'SparsityConfig.use_gradient: "{config.pruning_method}" has no place for a gradient; it counts with '
            f"{', '.join(WITH_GRADIENT)}"
        )
    reads = config.pruning_method != READS_NO_TEXT or config.use_gradient
    if config.pattern == "dynamic":
        return
    if reads and config.calibration_dataset is None:
        raise InvalidInput(
            f"SparsityConfig.calibration_dataset: {config.pruning_method}{' with gradients' * config.use_gradient} "
            'reads a text: name a file, a folder or a data set, or "python-docs:calibration", which Python brings along'
        )
    if not reads and not config.fuse_with_quant and config.calibration_dataset is not None:
        raise InvalidInput(
            "SparsityConfig.calibration_dataset does nothing: magnitude reads no text. Leave it out, or take another "
            "pruning_method"
        )


def stages(config: SparsityConfig, dense: list[str], widths: set[int]) -> list[Mapping[str, Any]]:
    """The stages of the recipe that a configuration stands for.

    Args:
        config: checked.
        dense: the names of the projections that stay as they are.
        widths: of the rows of all projections, by which the groups of quantised weights are chosen.

    Raises:
        InvalidInput: pattern "dynamic", which changes no weights.
    """
    if config.pattern == "dynamic":
        raise InvalidInput(
            'pattern "dynamic" changes no weights, so there is nothing to prune: give the model to load_sparse_model'
        )
    chosen = {"score": WITH_GRADIENT[config.pruning_method]} if config.use_gradient else METHODS[config.pruning_method]
    prune: dict[str, Any] = {**chosen, "pattern": _pattern(config), "dense": dense}
    if config.pattern != "n:m":
        prune["sparsity"] = float(config.sparsity_ratio)
    found: list[Mapping[str, Any]] = [{"prune": prune}]
    if config.fuse_with_quant:
        method = "nearest" if config.calibration_dataset is None else "gptq"
        found.append(quantize_stage(method, config.quant_dtype, widths, dense))
    return found


def _pattern(config: SparsityConfig) -> str:
    if config.pattern == "n:m":
        return f"{config.n}:{config.m}"
    return f"block:{config.block_size}x{config.block_size}" if config.pattern == "block" else "unstructured"


def quantize_stage(method: str, dtype: str | None, widths: set[int], dense: list[str]) -> Mapping[str, Any]:
    """The stage that rounds weights to `dtype` in groups that divide every row."""
    group = next((size for size in GROUPS if all(width % size == 0 for width in widths)), None)
    return {"quantize": {"method": method, "group": group, "dense": dense, **quantized_to(dtype)}}


def quantized_to(dtype: str | None) -> dict[str, Any]:
    """The options of the stage `quantize` for "int4" or "fp8".

    Raises:
        InvalidInput: another type, or none.
    """
    if dtype == "fp8":
        return {"grid": "e4m3"}
    for bits in range(2, 9):
        if dtype == f"int{bits}":
            return {"bits": bits}
    raise InvalidInput(f"quant_dtype: expected one of int2 to int8, or fp8, got {dtype!r}")


def layout(config: SparsityConfig) -> str | Mapping[str, Any]:
    """The format in which the engine holds weights: of the specification's `format`, or what goes with the pattern."""
    if config.format == "dense":
        return "dense"
    if config.pattern == "block":
        return {"block": {"rows": config.block_size, "columns": config.block_size}}
    return config.format if config.pattern == "unstructured" else "smallest"
