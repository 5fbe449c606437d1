"""A transformers model on the engine: weights packed, decoding on the fast path; `generate` stays transformers' own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparity.engine.decoding.model import quicken, slacken
from sparity.engine.formats import build_format, unpack
from sparity.engine.formats.conversions.smallest import smallest_format
from sparity.engine.formats.storage.values import Values
from sparity.engine.linear import PackedLinear
from sparity.engine.saving import save_packed, save_plain
from sparity.errors import InvalidInput


def attach(model: Any, form: str = "smallest", values: Values = "same") -> Any:
    """Run a causal language model on the engine, in place; the model is returned.

    Every linear layer of the blocks is packed, and its dense weight is let go; the head stays dense. Outputs are those
    of the model up to rounding. `generate` and all its options are transformers' own; see `decoding.model` for what is
    faster and when.

    Args:
        model: from transformers, on the CPU, in bfloat16. Layers that are packed already stay as they are.
        form: "smallest" of the formats that can hold a layer's zeros, or the name of one format for all layers.
        values: "same", or "int8" with a scale per output: then outputs change.

    Raises:
        InvalidInput: another type or device, no such format, or a layer whose zeros the format cannot hold.
    """
    _check(model)
    for name, layer in _linear(model):
        _replace(model, name, layer, form, values)
    save_packed(model)
    return quicken(model)


@contextmanager
def attached(model: Any, form: str = "smallest", values: Values = "same") -> Iterator[Any]:
    """`attach` within the context; then every layer is what it was, with the same parameters, bit for bit.

    Only with int8 values the dense weights stay in memory meanwhile.
    """
    _check(model)
    undo = []
    try:
        for name, layer in _linear(model):
            undo.append((name, layer, _replace(model, name, layer, form, values)))
            if values == "same" and undo[-1][-1] is not None:
                layer.weight.data = torch.empty(0, dtype=layer.weight.dtype)
        save_packed(model)
        yield quicken(model)
    finally:
        slacken(model)
        save_plain(model)
        for name, layer, packed in undo:
            if packed is None:
                continue
            if values == "same":
                weight = unpack(packed.packed)
                layer.weight.data = weight.T.contiguous() if packed.transposed else weight
            _put(model, name, layer)


def unsuited(model: Any) -> str | None:
    """Why the engine does not run a causal language model as it is held, or None when it does."""
    found = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    if found == {("cpu", torch.bfloat16)}:
        return None
    shown = ", ".join(sorted(f"{str(dtype).removeprefix('torch.')} on {device}" for device, dtype in found))
    return f"the engine runs models in bfloat16 on the CPU, not {shown}"


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "base_model") or not hasattr(model, "generate"):
        raise InvalidInput(f"attach takes a causal language model of transformers, not {type(model).__name__}")
    if reason := unsuited(model):
        raise InvalidInput(f"{reason}: model.to('cpu', torch.bfloat16)")


def _linear(model: Any) -> list[tuple[str, Any]]:
    """The linear layers of the blocks, which transformers' routers are not."""
    prefix = f"{model.base_model_prefix}."
    kinds = (nn.Linear, Conv1D)
    return [(name, layer) for name, layer in model.named_modules() if type(layer) in kinds and name.startswith(prefix)]


def _replace(model: Any, name: str, layer: Any, form: str, values: Values) -> PackedLinear | None:
    """Put a packed layer in the place of `layer`; None where it stays, because dense is what it will be."""
    transposed = isinstance(layer, Conv1D)
    weight = layer.weight.detach()
    weight = weight.T if transposed else weight
    chosen = smallest_format(weight, values) if form == "smallest" else build_format(form)
    if chosen.name == "dense" and values == "same" and not transposed:
        return None
    try:
        packed = chosen.pack(weight, values)
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error}") from error
    replacement = PackedLinear(name, weight.shape[1], weight.shape[0], layer.bias, transposed)
    replacement.give(packed)
    _put(model, name, replacement.train(layer.training))
    return replacement


def _put(model: Any, name: str, layer: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)
