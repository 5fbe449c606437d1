"""A transformers model on the engine: weights packed, decoding on the fast path; `generate` stays transformers' own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparity.engine.decoding.model import quicken, slacken
from sparity.engine.experts import PackedExperts
from sparity.engine.formats import Format, Packed, build_format, unpack
from sparity.engine.formats.conversions.smallest import smallest_format
from sparity.engine.formats.storage.values import Values
from sparity.engine.kernels.fastest import fastest_format
from sparity.engine.linear import PackedLinear
from sparity.engine.saving import save_packed, save_plain
from sparity.errors import InvalidInput
from sparity.models.experts import ExpertNames, expert_matrices, experts_of


def attach(model: Any, form: str = "smallest", values: Values = "same") -> Any:
    """Run a causal language model on the engine, in place; the model is returned.

    Every linear layer and every expert of the blocks is packed, and its dense weight is let go; the head stays dense.
    Outputs are those of the model up to rounding. `generate` and all its options are transformers' own; see
    `decoding.model` for what is faster and when.

    Args:
        model: from transformers, on the CPU, in bfloat16. Layers that are packed already stay as they are.
        form: of the formats that can hold a matrix's zeros the "smallest", or the "fastest", which is timed (dense
            where dense is); or the name of one format for all of them.
        values: "same", or "int8" with a scale per output: then outputs change.

    Raises:
        InvalidInput: another type or device, no such format, or a matrix whose zeros the format cannot hold.
    """
    _check(model)
    for name, layer in _linear(model):
        _replace(model, name, layer, form, values)
    for name, stored in experts_of(model).items():
        _replace_experts(model, name, stored, form, values)
    save_packed(model)
    return quicken(model)


@contextmanager
def attached(model: Any, form: str = "smallest", values: Values = "same") -> Iterator[Any]:
    """`attach` within the context; then every layer is what it was, with the same parameters, bit for bit.

    Only with int8 values the dense weights stay in memory meanwhile.
    """
    _check(model)
    undo: list[tuple[str, Any, PackedLinear | PackedExperts | None]] = []
    try:
        for name, layer in _linear(model):
            undo.append((name, layer, _replace(model, name, layer, form, values)))
            if values == "same" and undo[-1][-1] is not None:
                layer.weight.data = torch.empty(0, dtype=layer.weight.dtype)
        for name, stored in experts_of(model).items():
            experts = model.get_submodule(name)
            undo.append((name, experts, _replace_experts(model, name, stored, form, values)))
            if values == "same" and undo[-1][-1] is not None:
                for parameter in experts.parameters():
                    parameter.data = torch.empty(0, dtype=parameter.dtype)
        save_packed(model)
        yield quicken(model)
    finally:
        slacken(model)
        save_plain(model)
        for name, layer, packed in undo:
            if packed is None:
                continue
            if values == "same":
                for parameter, weight in _dense(packed).items():
                    layer.get_parameter(parameter).data = weight
            _put(model, name, layer)


def _dense(packed: PackedLinear | PackedExperts) -> dict[str, Tensor]:
    """The weights of what `packed` stands for, by parameter."""
    if isinstance(packed, PackedExperts):
        return packed.dense()
    weight = unpack(packed.packed)
    return {"weight": weight.T.contiguous() if packed.transposed else weight}


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
    chosen = _chosen(weight, form, values)
    if chosen.name == "dense" and values == "same" and not transposed:
        return None
    replacement = PackedLinear(name, weight.shape[1], weight.shape[0], layer.bias, transposed)
    replacement.give(_packed(name, weight, chosen, values))
    _put(model, name, replacement.train(layer.training))
    return replacement


def _replace_experts(model: Any, name: str, stored: ExpertNames, form: str, values: Values) -> PackedExperts | None:
    """Put packed experts in the place of a module with fused ones; None where it stays, because all would be dense."""
    experts = model.get_submodule(name)
    every = [[matrix.detach() for matrix in expert_matrices(experts, expert)] for expert in range(len(stored))]
    chosen = [[_chosen(matrix, form, values) for matrix in expert] for expert in every]
    if values == "same" and {found.name for expert in chosen for found in expert} == {"dense"}:
        return None
    replacement = PackedExperts.like(experts, stored)
    replacement.give(
        (
            _packed(names[0], gate, forms[0], values),
            _packed(names[1], up, forms[1], values),
            _packed(names[2], down, forms[2], values),
        )
        for names, (gate, up, down), forms in zip(stored, every, chosen, strict=True)
    )
    _put(model, name, replacement)
    return replacement


def _chosen(weight: Tensor, form: str, values: Values) -> Format:
    if form == "fastest":
        return fastest_format(weight, values).format
    return smallest_format(weight, values) if form == "smallest" else build_format(form)


def _packed(name: str, weight: Tensor, form: Format, values: Values) -> Packed:
    try:
        return form.pack(weight, values)
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error}") from error


def _put(model: Any, name: str, layer: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)
