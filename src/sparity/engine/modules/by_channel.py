"""Which weights lie by input channel: those behind skipped channels, which are then not read."""

from typing import Any

from torch import nn

from sparity.engine.kernels import native
from sparity.engine.kernels.native_weight import TAKES
from sparity.engine.modules.skips import InputSkip, output_skip_of, skip_of
from sparity.formats import Encoding, Packed, build_format, format_of

# The share of skipped channels from which it is faster: docs/performance.md.
LEAST, LEAST_OF_HALF_BYTES = 0.1, 0.5
LEAST_WITH_DOT_PRODUCTS = 0.65  # of half bytes, where the dense form's sums have instructions of their own


def skip_before(model: Any, name: str, layer: nn.Module) -> InputSkip | None:
    """What makes inputs of a layer 0: in front of it, or, for the last of a gated MLP, behind the gate's function."""
    mlp, _, leaf = name.rpartition(".")
    function = getattr(model.get_submodule(mlp), "act_fn", None) if leaf == "down_proj" else None
    return skip_of(layer) or (output_skip_of(function) if isinstance(function, nn.Module) else None)


def pays(encoding: Encoding, skip: InputSkip | None) -> bool:
    """Whether a dense weight in this encoding is multiplied faster by channel than row by row."""
    return skip is not None and ("columns", encoding.name) in TAKES and skip.tokens.sparsity >= least(encoding)


def least(encoding: Encoding) -> float:
    """The share of skipped channels from which weights in this encoding are multiplied faster by channel."""
    if not encoding.half_bytes:
        return LEAST
    return LEAST_WITH_DOT_PRODUCTS if native.instruction_set() == "avx512_bf16" else LEAST_OF_HALF_BYTES


def laid_out(model: Any, name: str, layer: nn.Module, packed: Packed) -> Packed:
    """A packed weight for the place of `layer`: a dense one by input channel where that pays, with the same values."""
    if packed.format != "dense" or not pays(packed.encoding, skip_before(model, name, layer)):
        return packed
    stored = format_of(packed).stored(packed)
    return build_format("columns").wrap(stored, packed.sides, packed.dtype, packed.encoding)
