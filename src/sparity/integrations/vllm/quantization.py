"""Packed layers in vLLM: what its models ask of a quantisation method."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from sparity.checkpoints.packed import METHOD, check_version, runtime_entries
from sparity.engine.kernels.prepared import prepare
from sparity.errors import InvalidInput
from sparity.integrations.vllm import operators, stored
from sparity.models import transformers as hf


class PackedConfig(QuantizationConfig):
    """What config.json says of a checkpoint of Sparity's, and where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None

    def get_name(self) -> str:
        """The method's name in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The types in which a model may run: that of the compiled kernels."""
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """None of a GPU."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        """From config.json's `quantization_config`.

        Raises:
            InvalidInput: a later version, or run-time stages, which are not attached in vLLM.
        """
        check_version(config)
        if entries := runtime_entries(config, "config.json"):
            named = ", ".join(entry.name for entry in entries)
            raise InvalidInput(f"run-time stages ({named}) are not attached in vLLM: give it a model without them")
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Learn where the checkpoint lies."""
        self.folder = Path(hf.locate(model_name))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """What makes and multiplies the weights of a layer; None leaves an embedding or a head to vLLM.

        Raises:
            InvalidInput: packed experts, or a packed embedding, which are not read in vLLM.
        """
        if self.folder is None:
            raise InvalidInput("vLLM did not say where the checkpoint lies")
        source = stored.opened(self.folder)
        if not isinstance(layer, LinearBase):
            if any(name.startswith(f"{prefix}.") for name in source.matrices):
                what = "experts" if f"{prefix}.weight" not in source.matrices else "embeddings"
                raise InvalidInput(
                    f"{self.folder}: {prefix} has packed {what}, which are not read in vLLM: pack without them"
                )
            return None
        names = stored.names_of(source, prefix, self.packed_modules_mapping)
        if not stored.is_packed(source, names):
            return UnquantizedLinearMethod()
        return PackedLinearMethod(self.folder, prefix, names)


class PackedLinearMethod(LinearMethodBase):
    """A layer whose weights stay packed, each matrix that it fuses by itself.

    vLLM hands every tensor of the files over by its name; here they are let pass, and the matrices are read by
    Sparity's own reader, which checks their hashes.
    """

    def __init__(self, folder: Path, prefix: str, names: tuple[str, ...]) -> None:
        self.folder, self.names = folder, names
        self.key = f"{folder}:{prefix}"  # by which the operator finds the weights
        self.rows = 0

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Make room for the names of the tensors, not for the tensors.

        Raises:
            InvalidInput: a part of the layer only, as with tensor parallelism.
            CorruptFile: matrices of other shapes.
        """
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise InvalidInput("packed weights are not split among devices: tensor_parallel_size=1")
        source = stored.opened(self.folder)
        stored.check_shapes(source, self.names, output_partition_sizes, input_size)
        self.rows = output_size
        for part, dtype in stored.parts_of(source, self.names).items():
            placeholder = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            placeholder.weight_loader = let_pass  # type: ignore[attr-defined]
            layer.register_parameter(part, placeholder)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Read the matrices and make them ready to multiply."""
        source = stored.opened(self.folder)
        for part in stored.parts_of(source, self.names):
            delattr(layer, part)
        operators.keep(self.key, [prepare(packed) for packed in stored.read(source, self.names)])

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., in] -> `[..., out]`."""
        out: Tensor = operators.packed_layer(x, self.key, self.rows)
        return out if bias is None else out + bias


def let_pass(*_: Any) -> None:
    """A loader of weights that takes nothing."""
