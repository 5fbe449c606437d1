"""The interface of sageLLM's module specification 3.2: what a sparsity backend is asked, and what it is told."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from sparity.errors import InvalidInput, suggestion

SparsityPattern = Literal["unstructured", "n:m", "block", "dynamic"]
PruningMethod = Literal["magnitude", "gradient", "hessian", "wanda", "sparsegpt"]
SparsityFormat = Literal["csr", "coo", "bsr", "dense"]
Backend = Literal["cuda", "triton", "tensorrt"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "pattern": get_args(SparsityPattern),
    "pruning_method": get_args(PruningMethod),
    "format": get_args(SparsityFormat),
    "backend": get_args(Backend),
}
_WHOLE = ("n", "m", "block_size")
_NUMBERS = ("sparsity_ratio", "dynamic_threshold")
_TRUTH = ("use_gradient", "enable_dynamic", "fuse_with_quant", "use_hardware_accel")
_NAMES = ("target_layers", "exclude_layers")
_TEXTS = ("calibration_dataset", "quant_dtype")


@dataclass
class SparsityConfig:
    """The specification's configuration, its names and defaults.

    Every field does something or is refused: a value other than the default where it would change nothing is an error
    (`sparity.integrations.sagellm.meaning`), as is one that contradicts another.

    Attributes:
        pattern: which weights may be zero; "dynamic" leaves them alone and skips activations while the model runs.
        sparsity_ratio: the share of weights to remove, in [0, 1); "n:m" says it already.
        n: of "n:m", how many of `m` neighbours of a row are kept.
        m: of "n:m", how many neighbours make a group.
        pruning_method: how much a weight matters, and whether the rest makes up for it ("sparsegpt").
        target_layers: parts of names of projections, or globs, that are pruned; None is all.
        exclude_layers: those that are not.
        calibration_dataset: the text for methods that read one: a file, a folder, a data set, or a bundled text.
        use_gradient: let the gradient count beside the method's own measure.
        block_size: the side of a square block, of "block".
        format: how `load_sparse_model` holds unstructured weights or blocks in memory.
        enable_dynamic: skip small activations too, while the model runs.
        dynamic_threshold: those whose magnitude it is not below.
        fuse_with_quant: quantise what is left, in the same run.
        quant_dtype: to what: "int2" to "int8", or "fp8".
        backend: whose kernels the selector names; "tensorrt" exports only.
        use_hardware_accel: let the selector name the hardware's own N:M kernel.
    """

    pattern: SparsityPattern = "n:m"
    sparsity_ratio: float = 0.5
    n: int = 2
    m: int = 4
    pruning_method: PruningMethod = "magnitude"
    target_layers: list[str] | None = None
    exclude_layers: list[str] | None = None
    calibration_dataset: str | None = None
    use_gradient: bool = False
    block_size: int = 32
    format: SparsityFormat = "csr"
    enable_dynamic: bool = False
    dynamic_threshold: float = 0.1
    fuse_with_quant: bool = False
    quant_dtype: str | None = None
    backend: Backend = "cuda"
    use_hardware_accel: bool = True

    def __post_init__(self) -> None:
        check_types(self)

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {field.name: now for field in fields(self) if (now := getattr(self, field.name)) != field.default}


def check_types(config: SparsityConfig) -> None:
    """Refuse a value of the wrong kind, by the name of its field.

    Raises:
        InvalidInput: not of the type or choice that the specification gives.
    """
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            raise _wrong(name, f"one of {', '.join(choices)}{suggestion(str(value), choices)}", value)
    for name in _WHOLE:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise _wrong(name, "a whole number, 1 or more", value)
    for name in _NUMBERS:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise _wrong(name, "a number, 0 or more", value)
    for name in _TRUTH:
        if type(getattr(config, name)) is not bool:
            raise _wrong(name, "True or False", getattr(config, name))
    for name in _NAMES:
        value = getattr(config, name)
        if value is not None and (isinstance(value, str) or not all(isinstance(each, str) and each for each in value)):
            raise _wrong(name, 'a list of names such as ["self_attn.q_proj"]', value)
    for name in _TEXTS:
        value = getattr(config, name)
        if value is not None and not (isinstance(value, str) and value):
            raise _wrong(name, "a text, or None", value)


def _wrong(name: str, expected: str, value: object) -> InvalidInput:
    return InvalidInput(f"SparsityConfig.{name}: expected {expected}, got {value!r}")


class SparsityProtocol(ABC):
    """The specification's interface of a sparsity backend."""

    @abstractmethod
    def prune(self, model_path: str, config: SparsityConfig) -> str:
        """Prune a model; the path of the sparse one."""

    @abstractmethod
    def load_sparse_model(self, model_path: str, config: SparsityConfig) -> Any:
        """Load a sparse model, with what its kernels are bound to."""

    @abstractmethod
    def verify_sparsity(self, model_path: str) -> dict[str, float]:
        """The share of zeros, layer by layer."""

    @abstractmethod
    def select_kernel(self, config: SparsityConfig) -> str:
        """The best kernel for a pattern on this hardware."""

    @abstractmethod
    def report(self) -> dict[str, float]:
        """Sparsity, speed-up, loss of quality, memory saved."""
