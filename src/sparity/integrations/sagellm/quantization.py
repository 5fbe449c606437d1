"""What the specification calls of sageLLM's quantisation module (3.1), by Sparity's stage `quantize`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparity.errors import InvalidInput, wrong_input
from sparity.files import expand
from sparity.integrations.sagellm import layers, meaning
from sparity.integrations.sagellm.manager import DRAWN, OUTPUT, SparsityManager, make
from sparity.integrations.sagellm.protocol import SparsityConfig
from sparity.models import Decoder
from sparity.models import transformers as hf

READS_NO_TEXT = "nearest"
_SIXTEEN = re.compile(r"(w\d+)?a16|float16|bfloat16")


@dataclass
class QuantConfig:
    """What the specification says of quantisation.

    Attributes:
        weight_dtype: "int2" to "int8", or "fp8".
        activation_dtype: activations stay as they are: "w8a16" and other names that end in a16.
        calibration: a method of Sparity's: "awq", "gptq", "nearest", "smoothquant", "slim_llm".
    """

    weight_dtype: str = "int4"
    activation_dtype: str = "w8a16"
    calibration: str = "awq"

    def __post_init__(self) -> None:
        meaning.quantized_to(self.weight_dtype)
        if not _SIXTEEN.fullmatch(self.activation_dtype):
            raise InvalidInput(
                f"QuantConfig.activation_dtype: activations stay in 16 bits, as in w8a16, not {self.activation_dtype!r}"
            )


class QuantizationManager:
    """Quantises a checkpoint, its zeros kept.

    Args:
        config: what is done where `calibrate` is given no other.
        output: see `SparsityManager`.
        dtype: see `SparsityManager`.
        calibration: see `SparsityManager`.
    """

    def __init__(
        self,
        config: QuantConfig,
        *,
        output: str | Path = OUTPUT,
        dtype: str = "auto",
        calibration: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self._output, self._dtype, self._calibration = expand(output), dtype, dict(calibration or {})

    @wrong_input()
    def calibrate(self, model_path: str, dataset: str | None = None, config: QuantConfig | None = None) -> str:
        """Quantise the weights of the projections; the folder of the result.

        The checkpoint holds what the codes stand for, in the model's own type, and opens anywhere.

        Raises:
            InvalidInput: a method that reads a text, and none; and as of `sparity.run`.
        """
        config = self.config if config is None else config
        reads = config.calibration != READS_NO_TEXT
        if reads and dataset is None:
            raise InvalidInput(f"QuantizationManager.calibrate: {config.calibration} reads a text: name one")
        widths = layers.widths(Decoder.open(hf.locate(model_path)))
        recipe: dict[str, Any] = {
            "model": str(model_path),
            "dtype": self._dtype,
            "stages": [meaning.quantize_stage(config.calibration, config.weight_dtype, widths, [])],
            "measure": {"speed": None},
        }
        if reads:
            recipe["calibration"] = {"text": dataset, **DRAWN, **self._calibration}
        return str(make(recipe, self._output))


def joint_sparse_quant(model_path: str, **options: Any) -> str:
    """2:4 by Wanda, then AWQ to 4 bits, each as its own run: the specification's order.

    Args:
        model_path: the dense model.
        options: of both managers: `output`, `dtype`, `calibration`.
    """
    sparse = SparsityConfig(pattern="n:m", n=2, m=4, pruning_method="wanda", calibration_dataset="wikitext-2")
    sparse_model = SparsityManager(sparse, **options).prune(model_path, sparse)
    quant = QuantConfig(weight_dtype="int4", activation_dtype="w8a16", calibration="awq")
    return QuantizationManager(quant, **options).calibrate(sparse_model, "wikitext-2", quant)
